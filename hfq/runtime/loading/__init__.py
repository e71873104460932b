"""From a checkpoint's files to a model with int8 modules."""
