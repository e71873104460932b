"""Why INT8 differs: each layer alone, its activations, what would mend it, and the examples whose answers flip."""
