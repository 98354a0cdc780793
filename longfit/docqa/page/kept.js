// A text shaded by what was kept of it. Used by the served page and by the report; see kept_picture.py for the data.

const LEVELS = 8;
const BLOCK_CHARACTERS = 1500;
const LONGEST_BLOCK = 4000;

/** The picture with its map unpacked: `rows` has a Uint8Array of per cents for each layer, the mean over layers first. */
export async function unpack(given) {
  const packed = Uint8Array.from(atob(given.map), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const bytes = new Uint8Array(await new Response(stream).arrayBuffer());
  const cells = given.documents.reduce((sum, document) => sum + document.lengths.length, 0);
  const rows = Array.from({ length: given.layers.length + 1 }, (_, i) => bytes.subarray(i * cells, (i + 1) * cells));
  return { ...given, rows };
}

/** Where character `n`, counted in whole code points as Python does, lies in a string. */
export function place(text, n) {
  if (!/[\ud800-\udbff]/.test(text)) return n;
  let at = 0;
  for (let i = 0; i < n && at < text.length; i += 1) at += text.codePointAt(at) > 0xffff ? 2 : 1;
  return at;
}

/** "all layers" or the layer's number, and how much of it was kept. */
export function layerName(picture, row) {
  const share = `${picture.share[row].toFixed(picture.share[row] < 10 ? 1 : 0)} % kept`;
  return row === 0 ? `all layers, ${share}` : `layer ${picture.layers[row - 1]}, ${share}`;
}

/** The text of a picture's documents in a container. Only blocks near what is in sight are shaded. */
export class KeptText {
  constructor(container, picture) {
    this.container = container;
    this.picture = picture;
    this.row = 0;
    this.cited = [];
    this.blocks = [];
    this.near = new Set();
    container.replaceChildren();
    this.watcher = new IntersectionObserver((seen) => seen.forEach((entry) => this.#seen(entry)), {
      root: container,
      rootMargin: "800px 0px",
    });
    let first = 0;
    picture.documents.forEach((document, number) => {
      if (picture.documents.length > 1) container.append(element("h3", "kept-name", document.name));
      const made = cut(document, first).map((block) => ({ ...block, number, node: element("p", "kept-block") }));
      for (const block of made) {
        block.node.textContent = document.text.slice(block.start, block.end);
        if (block.page !== null) block.node.dataset.page = `page ${block.page}`;
        block.node.block = block;
        container.append(block.node);
        this.watcher.observe(block.node);
      }
      this.blocks.push(...made);
      first += document.lengths.length;
    });
  }

  /** Shade by one layer; 0 is the mean over all of them. */
  setLayer(row) {
    this.row = row;
    for (const block of this.near) this.#paint(block);
  }

  /** Mark a passage, in UTF-16 units, and bring it into sight; false if it is not in the text. */
  cite(number, start, end) {
    this.cited = [number, start, end];
    for (const block of this.near) this.#paint(block);
    const found = this.blocks.find((block) => block.number === number && start < block.end && end > block.start);
    if (!found) return false;
    this.near.add(found);
    this.#paint(found);
    this.container.scrollIntoView({ block: "nearest" });
    this.#bringIntoSight(found);
    // Heights of blocks that were never in sight are guesses until they are: once more when they are known.
    requestAnimationFrame(() => this.#bringIntoSight(found));
    return true;
  }

  /** Stop watching. */
  close() {
    this.watcher.disconnect();
  }

  #bringIntoSight(block) {
    const target = block.node.querySelector(".cited") ?? block.node;
    const from = this.container.getBoundingClientRect().top + this.container.clientHeight / 4;
    this.container.scrollBy({ top: target.getBoundingClientRect().top - from, behavior: "instant" });
  }

  #seen(entry) {
    const { block } = entry.target;
    if (entry.isIntersecting) {
      this.near.add(block);
      this.#paint(block);
    } else if (this.near.delete(block)) {
      block.node.textContent = block.node.textContent;
    }
  }

  #paint(block) {
    const document = this.picture.documents[block.number];
    const shares = this.picture.rows[this.row];
    const [number, from, to] = this.cited;
    const fragment = new DocumentFragment();
    let [at, run, look] = [block.start, block.start, null];
    const close = (end) => {
      if (end > run) fragment.append(element("span", look, document.text.slice(run, end)));
      run = end;
    };
    for (let cell = block.firstCell; cell < block.lastCell; cell += 1) {
      const end = at + document.lengths[cell - block.offset];
      const cited = number === block.number && at < to && end > from;
      const here = `k${level(shares[cell])}${cited ? " cited" : ""}`;
      if (here !== look) {
        close(at);
        look = here;
      }
      at = end;
    }
    close(at);
    block.node.replaceChildren(fragment);
  }
}

/** The shade of a share in per cent: 0 only for nothing at all. */
function level(share) {
  return share === 0 ? 0 : Math.max(1, Math.round((share * LEVELS) / 100));
}

/** Blocks of a document: cut at the ends of lines, at the starts of pages, and where there is neither between words. */
function cut(document, offset) {
  const starts = new Map(document.pages.map(([number, start]) => [start, number]));
  const blocks = [];
  let [start, at, firstCell, page] = [0, 0, 0, starts.get(0) ?? null];
  document.lengths.forEach((length, cell) => {
    at += length;
    const last = document.text.slice(at - length, at);
    const newPage = [...range(at - length + 1, at + 1)].find((place) => starts.has(place));
    const long = at - start > BLOCK_CHARACTERS && last.includes("\n");
    const tooLong = at - start > LONGEST_BLOCK && /\s/.test(last + (document.text[at] ?? " "));
    if (long || tooLong || newPage !== undefined || cell === document.lengths.length - 1) {
      blocks.push({ start, end: at, firstCell: offset + firstCell, lastCell: offset + cell + 1, offset, page });
      [start, firstCell, page] = [at, cell + 1, newPage === undefined ? null : starts.get(newPage)];
    }
  });
  return blocks;
}

function* range(from, to) {
  for (let i = from; i < to; i += 1) yield i;
}

function element(tag, look, text = "") {
  const made = document.createElement(tag);
  if (look) made.className = look;
  made.textContent = text;
  return made;
}
