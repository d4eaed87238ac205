package ai.onnxruntime;

import java.util.Map;
import java.util.Optional;

public class OrtSession implements AutoCloseable {
    public Result run(Map<String, ? extends OnnxTensorLike> inputs) throws OrtException {
        throw new UnsupportedOperationException();
    }

    public void close() throws OrtException { }

    public static class Result implements AutoCloseable {
        public Optional<OnnxValue> get(String key) {
            return Optional.empty();
        }

        public void close() { }
    }

    public static class SessionOptions implements AutoCloseable {
        public void setIntraOpNumThreads(int threads) throws OrtException { }

        public void close() { }
    }
}
