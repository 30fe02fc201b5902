// Search works on pages opened from a disk, too: browsers allow them no Worker, so the search runs in a hidden frame.
if (location.protocol === "file:") {
  const PREPARED = `<script>
    self.postMessage = (data) => parent.dispatchEvent(new MessageEvent("frame", { data }))
    self.receive = (data) => dispatchEvent(new MessageEvent("message", { data }))
    self.importScripts = (...urls) => urls.reduce((before, src) => before.then(() => new Promise((done) => {
      document.head.append(Object.assign(document.createElement("script"), { src, onload: done }))
    })), Promise.resolve())
  <\/script>`
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.frame = Object.assign(document.createElement("iframe"), { hidden: true })
      this.frame.srcdoc = `${PREPARED}<script src="${url}"><\/script>`
      this.ready = new Promise((done) => { this.frame.onload = done })
      document.body.append(this.frame)
      addEventListener("frame", ({ data }) => this.dispatchEvent(new MessageEvent("message", { data })))
    }
    postMessage(data) { this.ready.then(() => this.frame.contentWindow.receive(data)) }
    terminate() { this.frame.remove() }
  }
}
