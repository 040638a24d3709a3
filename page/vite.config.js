import { defineConfig } from "vite";

export default defineConfig({
  base: "./",
  build: {
    outDir: "../services/control_plane/page/built",
    emptyOutDir: true,
    assetsInlineLimit: 0, // the content security policy admits no data: URLs
    modulePreload: { polyfill: false },
    reportCompressedSize: false,
  },
  server: { proxy: { "/v1": "http://127.0.0.1:8000" } },
});
