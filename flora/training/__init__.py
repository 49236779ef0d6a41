"""Images, evaluation and training with timm's data sets, transforms and tasks."""
