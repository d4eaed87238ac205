"""Distillation: a compact student learns from a big teacher."""
