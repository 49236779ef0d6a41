"""flora: from a trained Vision Transformer and a budget to an engine with proof."""
