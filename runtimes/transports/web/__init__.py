"""Workers in a web browser: onnxruntime-web in headless Chromium, or in any browser that opens a page."""
