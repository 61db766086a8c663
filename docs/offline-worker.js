/* A Worker for pages that are opened from a folder (file://), where browsers refuse real ones: the search runs in a hidden
   frame. Elsewhere the browser's own Worker stays. The theme would load such a script from a server. */
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.body.appendChild(this.frame);
      const inside = this.frame.contentWindow;
      const answer = (data) => {
        const event = new MessageEvent("message", { data });
        this.dispatchEvent(event);
        if (this.onmessage) this.onmessage(event);
      };
      this.ready = new Promise((resolve) => {
        this.frame.contentDocument.open();
        inside.__answer = answer;
        inside.__ready = resolve;
        this.frame.contentDocument.write(
          "<html><body><script>" +
            "window.postMessage = (data) => window.__answer(data);" +
            "window.importScripts = (...urls) => Promise.all(urls.map((url) => new Promise((done, failed) => {" +
            "const one = document.createElement('script'); one.src = url; one.onload = done; one.onerror = failed;" +
            "document.body.appendChild(one); })));" +
            "<\/script><script src='" + new URL(url, location.href) + "' onload='window.__ready()'><\/script></body></html>"
        );
        this.frame.contentDocument.close();
      });
    }
    postMessage(data) {
      this.ready.then(() => {
        const inside = this.frame.contentWindow;
        inside.dispatchEvent(new inside.MessageEvent("message", { data }));
      });
    }
    terminate() {
      this.frame.remove();
    }
  };
}
