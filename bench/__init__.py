"""The bench: measure, verify, judge and report artifacts, whoever made them."""
