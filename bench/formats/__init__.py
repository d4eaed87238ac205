"""Results in the formats that other tools read, one module a format; :mod:`edgestill.bench.formats.output` chooses."""
