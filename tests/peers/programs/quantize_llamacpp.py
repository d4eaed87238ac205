"""``quantize_llamacpp.py FLOAT.gguf OUT.gguf FTYPE IMATRIX.npz``: llama.cpp's own quantiser with an importance matrix,
as ``llama-quantize --imatrix`` calls it: mean squared inputs by tensor name. Imports nothing of edgestill."""

import ctypes
import sys

import llama_cpp.llama_cpp as api
import numpy as np

SOURCE, TARGET, FTYPE, MATRIX = sys.argv[1:5]
found = np.load(MATRIX)
kept = [np.ascontiguousarray(found[name], np.float32) for name in found.files]
rows = (api.llama_model_imatrix_data * (len(kept) + 1))()  # ended by a name that is null
for row, name, values in zip(rows, found.files, kept, strict=False):
    row.name = name.encode()
    row.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    row.size = len(values)
params = api.llama_model_quantize_default_params()
params.ftype = int(FTYPE)
params.nthread = 1
params.imatrix = ctypes.cast(rows, ctypes.POINTER(api.llama_model_imatrix_data))
sys.exit(api.llama_model_quantize(SOURCE.encode(), TARGET.encode(), ctypes.byref(params)))
