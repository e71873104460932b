"""From an int8 model to files that stock transformers opens."""
