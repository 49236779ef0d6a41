"""Calibration and quantization."""
