"""Models of convolutions as steps that follow each other without the code of their modules."""
