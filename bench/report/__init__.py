"""The report: one HTML file without network, and the model card."""
