"""Exporters: a model folder in, a sealed artifact folder out."""
