package ai.djl.huggingface.tokenizers;

public class Encoding {
    public long[] getIds() {
        return new long[0];
    }
}
