// Explorer of a page: for the pixel that is clicked, or chosen with the arrow keys, it shows the class, its
// probability, and what the pixel attends to. tools/explore_page.py writes the data that this script reads.
// Names come from files; they are only ever set as text.
"use strict";

(() => {
  const CLASSES = "classes", CONFIDENCE = "confidence", NONE = "none";
  // Longest side of a heat map in pixels; the browser enlarges it.
  const HEAT_SIDE = 640;
  // Opacity of the classes that are not highlighted, of 255.
  const DIMMED = 40;
  // Steps of the arrow keys across a picture without attention maps.
  const STEPS = 64;

  const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
  const percent = (share) => (share > 0 && share < 0.001 ? "< 0.1 %" : `${(100 * share).toFixed(1)} %`);

  function make(tag, name, text) {
    const made = document.createElement(tag);
    if (name) made.className = name;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function bytes(text) {
    const binary = atob(text);
    const found = new Uint8Array(binary.length);
    for (let index = 0; index < found.length; index++) found[index] = binary.charCodeAt(index);
    return found;
  }

  async function unpacked(text) {
    const stream = new Blob([bytes(text)]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }

  // A color of ImageData as one number; its bytes are red, green, blue, opacity.
  const rgba = (red, green, blue, opacity) => ((opacity << 24) | (blue << 16) | (green << 8) | red) >>> 0;

  // A line of `many` picture pixels, divided by `cells` cells of a map over `features` features. The centers
  // of the first and last feature lie on those of the first and last pixel.
  class Axis {
    constructor(many, features, cells) {
      Object.assign(this, { many, features, cells });
    }
    cellOf(pixel) {
      const feature = Math.round((pixel * (this.features - 1)) / Math.max(this.many - 1, 1));
      return Math.floor(((2 * feature + 1) * this.cells) / (2 * this.features));
    }
    // The feature that stands for a cell, and its pixel.
    featureOf(cell) {
      return Math.floor(((2 * cell + 1) * this.features) / (2 * this.cells));
    }
    pixelOf(cell) {
      return Math.round((this.featureOf(cell) * (this.many - 1)) / Math.max(this.features - 1, 1));
    }
    // For each of `few` equal parts of the line: the cells between whose centers it lies, and how far.
    between(few) {
      const parts = { before: new Uint16Array(few), after: new Uint16Array(few), share: new Float32Array(few) };
      for (let index = 0; index < few; index++) {
        const pixel = ((index + 0.5) * this.many) / few - 0.5;
        const feature = this.many > 1 ? (pixel * (this.features - 1)) / (this.many - 1) : 0;
        const at = clamp(((feature + 0.5) * this.cells) / this.features - 0.5, 0, this.cells - 1);
        parts.before[index] = Math.floor(at);
        parts.after[index] = Math.min(parts.before[index] + 1, this.cells - 1);
        parts.share[index] = at - parts.before[index];
      }
      return parts;
    }
  }

  // The attention maps of a network over a picture.
  class Maps {
    constructor(size, [rows, columns], features, codes, largest) {
      this.down = new Axis(size[0], features[0], rows);
      this.across = new Axis(size[1], features[1], columns);
      this.codes = codes; // of each recurrence: uint8 [cell that attends, cell attended to]
      this.largest = largest; // of each recurrence: float32 [cell that attends]
      const exact = rows === features[0] && columns === features[1];
      this.largestName = exact ? "largest weight" : "largest mean weight of a cell";
    }
    static async of(size, data) {
      const codes = await Promise.all(data.maps.map(unpacked));
      const largest = await Promise.all(data.largest.map(unpacked));
      return new Maps(
        size, data.grid, data.features, codes, largest.map((each) => new Float32Array(each.buffer)));
    }
    cellOf([row, column]) {
      return this.down.cellOf(row) * this.across.cells + this.across.cellOf(column);
    }
    pixelOf(cell) {
      const { cells } = this.across;
      return [this.down.pixelOf(Math.floor(cell / cells)), this.across.pixelOf(cell % cells)];
    }
    featureOf(cell) {
      const { cells } = this.across;
      return [this.down.featureOf(Math.floor(cell / cells)), this.across.featureOf(cell % cells)];
    }
    // Codes of the map of a cell.
    codesOf(recurrence, cell) {
      const length = this.down.cells * this.across.cells;
      return this.codes[recurrence].subarray(cell * length, (cell + 1) * length);
    }
    // Weights of the map of a cell.
    weightsOf(recurrence, cell) {
      const largest = this.largest[recurrence][cell];
      return Array.from(this.codesOf(recurrence, cell), (code) => largest * (code / 255) ** 2);
    }
  }

  // Colors of the codes of a map over a gray picture: where weights are small, the picture shows through.
  function heatColors(heat) {
    const colors = new Uint32Array(256);
    for (let code = 0; code < 256; code++) {
      const strength = code / 255;
      const opacity = 1 - 0.45 * (1 - strength);
      const factor = (0.25 + 0.75 * strength) / opacity;
      const channel = (index) => Math.round(heat[3 * code + index] * factor);
      colors[code] = rgba(channel(0), channel(1), channel(2), Math.round(255 * opacity));
    }
    return colors;
  }

  // A picture with a canvas and a cross over it.
  class Panel {
    constructor(kind) {
      this.element = make("figure", kind);
      this.stage = make("div", "stage");
      this.image = make("img");
      this.image.alt = "";
      this.image.draggable = false;
      this.canvas = make("canvas", kind);
      this.cross = make("div", "cross");
      this.caption = make("figcaption");
      this.stage.append(this.image, this.canvas, this.cross);
      this.element.append(this.stage, this.caption);
    }
    show(picture, longest) {
      const [height, width] = picture.size;
      this.size = picture.size;
      this.stage.style.aspectRatio = `${width} / ${height}`;
      this.stage.style.maxWidth = `calc(80vh * ${width / height})`;
      this.image.src = picture.jpeg;
      const factor = Math.min(1, longest / Math.max(...picture.shown));
      [this.canvas.height, this.canvas.width] = picture.shown.map((side) => Math.max(1, Math.round(side * factor)));
      this.context = this.canvas.getContext("2d");
      this.content = this.context.createImageData(this.canvas.width, this.canvas.height);
      this.pixels = new Uint32Array(this.content.data.buffer);
    }
    mark([row, column]) {
      this.cross.style.top = `${(100 * (row + 0.5)) / this.size[0]}%`;
      this.cross.style.left = `${(100 * (column + 0.5)) / this.size[1]}%`;
    }
    put() {
      this.context.putImageData(this.content, 0, 0);
    }
    // Draw a map, interpolated between the centers of its cells.
    draw(codes, rows, columns, cells, colors) {
      const width = columns.before.length;
      const line = new Float32Array(cells);
      for (let y = 0, place = 0; y < rows.before.length; y++) {
        const above = rows.before[y] * cells, below = rows.after[y] * cells, down = rows.share[y];
        for (let cell = 0; cell < cells; cell++) {
          line[cell] = codes[above + cell] * (1 - down) + codes[below + cell] * down + 0.5;
        }
        for (let x = 0; x < width; x++, place++) {
          const left = line[columns.before[x]], right = line[columns.after[x]];
          this.pixels[place] = colors[(left + (right - left) * columns.share[x]) | 0];
        }
      }
      this.put();
    }
  }

  // A network: its panels, its classes, and what it makes of the picture and the pixel.
  class View {
    constructor(about, explorer) {
      Object.assign(this, { about, explorer, heats: [] });
      this.element = make("section");
      this.element.append(make("h3", "", about.title), make("p", "note", about.note));
      if (about.noMaps) this.element.append(make("p", "missing", about.noMaps));
      this.panels = make("div", "panels");
      this.prediction = new Panel("classes");
      this.panels.append(this.prediction.element);
      explorer.listen(this.prediction.stage);
      this.readout = make("div", "readout");
      this.legend = make("ul", "legend");
      this.legend.setAttribute("aria-label", "Classes of the prediction; choose one to highlight it");
      this.element.append(this.readout, this.panels, this.legend);
      this.highlighted = null;
    }

    async load(picture, data) {
      const planes = [data.classes, data.confidence, data.second, data.secondConfidence];
      const [classes, confidence, second, secondConfidence] = await Promise.all(
        planes.map((plane) => (plane === null ? null : unpacked(plane))));
      const maps = data.maps ? await Maps.of(picture.size, data) : null;
      return { classes, confidence, second, secondConfidence, maps, shares: data.shares };
    }

    show(picture, loaded) {
      Object.assign(this, { picture, ...loaded });
      this.highlighted = null;
      this.prediction.show(picture, Infinity);
      while (this.heats.length < (this.maps?.codes.length ?? 0)) {
        const panel = new Panel("heat");
        this.explorer.listen(panel.stage);
        this.heats.push(panel);
        this.panels.append(panel.element);
      }
      for (const panel of this.heats) {
        panel.show(picture, HEAT_SIDE);
        this.rows = this.maps.down.between(panel.canvas.height);
        this.columns = this.maps.across.between(panel.canvas.width);
      }
      this.list();
      this.paint();
    }

    nameOf(index) {
      return this.about.names[index] ?? `class ${index}`;
    }

    swatch(index) {
      const made = make("i", "color");
      made.style.background = `rgb(${this.about.colors[index].join(",")})`;
      return made;
    }

    // List the classes of the picture, those with most pixels first.
    list() {
      this.legend.replaceChildren(...this.shares.map(([index, share]) => {
        const button = make("button");
        button.type = "button";
        button.setAttribute("aria-pressed", "false");
        button.append(this.swatch(index), this.nameOf(index), make("span", "", percent(share)));
        button.addEventListener("click", () => this.highlight(index));
        button.addEventListener("mouseenter", () => this.paint(index));
        button.addEventListener("mouseleave", () => this.paint());
        const item = make("li");
        item.append(button);
        return item;
      }));
    }

    // Highlight a class, or no class if it is highlighted already.
    highlight(index) {
      this.highlighted = this.highlighted === index ? null : index;
      this.shares.forEach(([each], place) => {
        const button = this.legend.children[place].firstChild;
        button.setAttribute("aria-pressed", String(each === this.highlighted));
      });
      this.paint();
    }

    // Paint the classes or their probability over the picture.
    paint(only = this.highlighted) {
      const { overlay, opacity, colors } = this.explorer;
      const { prediction } = this;
      prediction.canvas.style.opacity = overlay === NONE ? 0 : opacity;
      const table = new Uint32Array(256);
      this.about.colors.forEach(([red, green, blue], index) => {
        table[index] = rgba(red, green, blue, only === null || only === index ? 255 : DIMMED);
      });
      if (overlay === CONFIDENCE) colors.forEach((color, code) => { table[code] = (color | 0xff000000) >>> 0; });
      const values = overlay === CONFIDENCE ? this.confidence : this.classes;
      for (let place = 0; place < values.length; place++) prediction.pixels[place] = table[values[place]];
      prediction.put();
      const what = { [CLASSES]: "prediction", [CONFIDENCE]: "confidence: brighter is higher", [NONE]: "picture" };
      prediction.caption.textContent = what[overlay][0].toUpperCase() + what[overlay].slice(1);
    }

    // Show a pixel (row, column) of the picture; return what it shows, in words.
    point(pixel) {
      const place = pixel.map((at, axis) => {
        const [many, few] = [this.picture.size[axis], this.picture.shown[axis]];
        return Math.min(few - 1, Math.floor(((at + 0.5) * few) / many));
      });
      const at = place[0] * this.picture.shown[1] + place[1];
      this.prediction.mark(pixel);
      const said = [`class ${this.nameOf(this.classes[at])}, ${percent(this.confidence[at] / 255)}`];
      const first = make("span");
      first.append(this.swatch(this.classes[at]), make("b", "", this.nameOf(this.classes[at])),
        ` ${percent(this.confidence[at] / 255)}`);
      this.readout.replaceChildren(first);
      if (this.second) {
        const name = this.nameOf(this.second[at]), share = percent(this.secondConfidence[at] / 255);
        said.push(`then ${name}, ${share}`);
        const next = make("span");
        next.append("then ", this.swatch(this.second[at]), `${name} ${share}`);
        this.readout.append(next);
      }
      if (this.maps) this.attend(pixel, said);
      return said.join("; ");
    }

    attend(pixel, said) {
      const { maps } = this;
      this.cell = maps.cellOf(pixel);
      const source = maps.pixelOf(this.cell);
      this.heats.forEach((panel, recurrence) => {
        const codes = maps.codesOf(recurrence, this.cell);
        panel.draw(codes, this.rows, this.columns, maps.across.cells, this.explorer.colors);
        panel.mark(source);
        const largest = `${maps.largestName} ${maps.largest[recurrence][this.cell].toPrecision(3)}`;
        const [row, column] = maps.pixelOf(codes.indexOf(255));
        panel.caption.textContent = `R = ${recurrence + 1}: ${largest}`;
        said.push(`R = ${recurrence + 1}: ${largest} at row ${row}, column ${column}`);
      });
      const where = `maps of row ${source[0]}, column ${source[1]}`;
      this.readout.append(make("span", "hint", where));
    }
  }

  class Explorer {
    constructor(root) {
      this.root = root;
      this.about = JSON.parse(root.querySelector("script.about").textContent);
      this.sources = [...root.querySelectorAll("script.picture")];
      this.colors = heatColors(bytes(this.about.heat));
      this.overlay = CLASSES;
      this.opacity = 0.6;
      this.stages = [];
      this.turn = 0;
      this.views = this.about.networks.map((about) => new View(about, this));
      this.spoken = make("div", "spoken");
      this.spoken.setAttribute("aria-live", "polite");
      this.where = make("span", "hint");
      root.append(this.chooser(), this.tools(), ...this.views.map((view) => view.element), this.spoken);
      this.show(0);
    }

    // Show a picture; say so if the browser can't.
    show(index) {
      this.ready = this.choose(index).catch((error) => {
        this.where.textContent = `This browser can't show the picture (${error.message}).`;
      });
    }

    chooser() {
      const list = make("div", "choose");
      list.setAttribute("role", "group");
      list.setAttribute("aria-label", "Pictures");
      this.buttons = this.about.pictures.map(({ name, thumbnail }, index) => {
        const button = make("button"), image = make("img");
        button.type = "button";
        button.title = name;
        image.alt = "";
        image.src = thumbnail;
        button.append(image, make("span", "", name));
        button.addEventListener("click", () => this.show(index));
        return button;
      });
      list.append(...this.buttons);
      return list;
    }

    tools() {
      const tools = make("div", "tools");
      const overlay = make("select", "overlay"), opacity = make("input", "opacity");
      for (const [value, text] of [[CLASSES, "Prediction"], [CONFIDENCE, "Confidence"], [NONE, "Nothing"]]) {
        const option = make("option", "", text);
        option.value = value;
        overlay.append(option);
      }
      Object.assign(opacity, { type: "range", min: "0", max: "100", value: String(100 * this.opacity) });
      const repaint = () => {
        this.overlay = overlay.value;
        this.opacity = Number(opacity.value) / 100;
        for (const view of this.views) view.paint();
      };
      overlay.addEventListener("change", repaint);
      opacity.addEventListener("input", repaint);
      for (const [text, control] of [["Over the picture", overlay], ["Opacity", opacity]]) {
        const label = make("label", "", text);
        label.append(control);
        tools.append(label);
      }
      tools.append(this.where);
      return tools;
    }

    // Let a stage choose pixels.
    listen(stage) {
      const at = (event) => {
        const box = stage.getBoundingClientRect();
        const shares = [(event.clientY - box.top) / box.height, (event.clientX - box.left) / box.width];
        this.point(shares.map((share, axis) => Math.floor(share * this.picture.size[axis])));
      };
      stage.addEventListener("click", at);
      stage.addEventListener("pointermove", (event) => {
        if (event.pointerType === "mouse" && event.buttons & 1) at(event);
      });
      stage.addEventListener("keydown", (event) => this.move(event));
      stage.tabIndex = this.stages.length ? -1 : 0;
      if (!this.stages.length) stage.setAttribute("role", "application");
      this.stages.push(stage);
    }

    // Move the pixel with the arrow keys: to the next cell or, with the shift key, to the next pixel.
    move(event) {
      const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
      if (!step || event.ctrlKey || event.altKey || event.metaKey) return;
      event.preventDefault();
      const maps = this.views.find((view) => view.maps)?.maps;
      const axes = maps && [maps.down, maps.across];
      this.point(this.pixel.map((at, axis) => {
        if (!step[axis]) return at;
        if (event.shiftKey) return at + step[axis];
        if (!axes) return at + step[axis] * Math.max(1, Math.round(this.picture.size[axis] / STEPS));
        return axes[axis].pixelOf(clamp(axes[axis].cellOf(at) + step[axis], 0, axes[axis].cells - 1));
      }));
    }

    async choose(index) {
      const turn = ++this.turn;
      this.buttons.forEach((button, each) => button.setAttribute("aria-pressed", String(each === index)));
      const picture = JSON.parse(this.sources[index].textContent);
      const loaded = await Promise.all(
        this.views.map((view, number) => view.load(picture, picture.networks[number])));
      if (turn !== this.turn) return; // another picture was chosen meanwhile
      this.picture = picture;
      this.views.forEach((view, number) => view.show(picture, loaded[number]));
      const name = this.about.pictures[index].name;
      this.stages[0].setAttribute("aria-label", `${name}: choose a pixel with the arrow keys`);
      this.point(picture.size.map((side) => Math.floor(side / 2)));
    }

    // Show a pixel (row, column), or the next one inside of the picture.
    point(pixel) {
      this.pixel = pixel.map((at, axis) => clamp(at, 0, this.picture.size[axis] - 1));
      const where = `row ${this.pixel[0]}, column ${this.pixel[1]}`;
      this.where.textContent = where[0].toUpperCase() + where.slice(1);
      const said = this.views.map((view) => {
        const title = this.views.length > 1 ? `${view.about.title}: ` : "";
        return title + view.point(this.pixel);
      });
      this.spoken.textContent = `${where}: ${said.join(". ")}`;
    }
  }

  for (const root of document.querySelectorAll(".explorer")) root.explorer = new Explorer(root);
})();
