"""Branches that train beside a layer and are gone when it serves."""
