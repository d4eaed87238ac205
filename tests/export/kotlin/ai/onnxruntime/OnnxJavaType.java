package ai.onnxruntime;

public enum OnnxJavaType { FLOAT, FLOAT16, INT8, UINT8, INT64 }
