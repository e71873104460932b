"""From a float model and a calibration slice to an int8 model: observers, scales, SmoothQuant, conversion."""
