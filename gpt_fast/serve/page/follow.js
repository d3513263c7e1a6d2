/** Keeps the end of what grows in view while the reader is there, and leaves the view alone when the reader is not. */

const NEAR = 48; // pixels from the end that still count as there

export class Follow {
  /** scroller scrolls over `content`; `button` takes the reader to the end. */
  constructor(scroller, content, button) {
    this.scroller = scroller;
    this.button = button;
    this.following = true;
    scroller.addEventListener("scroll", () => this.look());
    button.addEventListener("click", () => this.toEnd());
    new ResizeObserver(() => (this.following ? this.toEnd() : this.look())).observe(content);
  }

  look() {
    const { scrollTop, scrollHeight, clientHeight } = this.scroller;
    this.following = scrollHeight - scrollTop - clientHeight < NEAR;
    this.button.hidden = this.following;
  }

  toEnd() {
    this.scroller.scrollTop = this.scroller.scrollHeight;
    this.following = true;
    this.button.hidden = true;
  }
}
