"""Results of other tools, read into our records: each row measured, each marked with the tool that it comes from."""
