// Search from pages opened as files, where browsers start no Worker: its script runs in a hidden frame instead.
if (location.protocol === "file:")
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      this.waiting = [];
      const start = () => {
        document.body.append(frame);
        this.inner = frame.contentWindow;
        this.inner.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
        this.inner.importScripts = () => undefined;
        const script = this.inner.document.createElement("script");
        script.src = url;
        script.onload = () => {
          this.ready = true;
          this.waiting.forEach((data) => this.postMessage(data));
        };
        this.inner.document.body.append(script);
      };
      if (document.body) start();
      else addEventListener("DOMContentLoaded", start);
    }
    postMessage(data) {
      if (this.ready) this.inner.dispatchEvent(new MessageEvent("message", { data }));
      else this.waiting.push(data);
    }
    terminate() {}
  };
