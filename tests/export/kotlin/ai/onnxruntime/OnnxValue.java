package ai.onnxruntime;

/** The part of ONNX Runtime's Java interface that the samples use: signatures to compile against, nothing to run. */
public interface OnnxValue extends AutoCloseable {
    void close();
}
