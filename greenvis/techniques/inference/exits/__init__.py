"""Early exits: samples that are sure leave."""
