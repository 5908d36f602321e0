"""Write the catalogue of techniques anew, `make readme`: what a terminal and the site say of them without importing torch."""

from __future__ import annotations

from greenvis.techniques import registry

if __name__ == "__main__":
    registry.CATALOGUE.write_text(registry.catalogue())
