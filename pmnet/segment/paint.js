// A photo to paint on. The server keeps the strokes; this draws them and reports each new one.
export default {
  template: `
    <div class="paint">
      <img :src="photo" draggable="false" />
      <canvas ref="canvas" :width="width" :height="height" :style="{ cursor }"
        @pointerdown="begin" @pointermove="move" @pointerup="end" @pointercancel="end"></canvas>
    </div>`,
  props: {
    photo: String, // address of the picture
    base: String, // address of an uploaded mask, transparent outside
    width: Number, // of the picture, in pixels
    height: Number,
    strokes: Array, // of {tool, size, points}, in shares of the width and the height
    tool: String, // brush, erase, or outline
    size: Number, // of the brush, as a share of the width
    colour: String, // of the mask
  },
  data: () => ({ current: null, pending: [], below: null }),
  computed: {
    cursor() {
      if (this.tool === "outline") return "crosshair";
      const side = Math.min(128, Math.max(4, this.size * (this.$refs.canvas?.clientWidth || 400)));
      const circle = `<svg xmlns="http://www.w3.org/2000/svg" width="${side}" height="${side}">` +
        `<circle cx="${side / 2}" cy="${side / 2}" r="${side / 2 - 1}" fill="none" stroke="white" stroke-width="2"/>` +
        `<circle cx="${side / 2}" cy="${side / 2}" r="${side / 2 - 1}" fill="none" stroke="black"/></svg>`;
      return `url('data:image/svg+xml,${encodeURIComponent(circle)}') ${side / 2} ${side / 2}, crosshair`;
    },
  },
  watch: {
    strokes() {
      this.pending = [];
      this.draw();
    },
    base() {
      this.load();
    },
    colour() {
      this.draw();
    },
  },
  mounted() {
    this.load();
  },
  methods: {
    load() {
      this.below = null;
      this.draw();
      if (!this.base) return;
      const image = new Image();
      image.onload = () => {
        this.below = image;
        this.draw();
      };
      image.src = this.base;
    },
    place(event) {
      const box = this.$refs.canvas.getBoundingClientRect();
      const share = (value) => Math.round(1e4 * Math.min(1, Math.max(0, value))) / 1e4;
      return [share((event.clientX - box.left) / box.width), share((event.clientY - box.top) / box.height)];
    },
    begin(event) {
      if (event.button) return;
      this.$refs.canvas.setPointerCapture(event.pointerId);
      this.current = { tool: this.tool, size: this.size, points: [this.place(event)] };
      this.draw();
    },
    move(event) {
      if (!this.current) return;
      this.current.points.push(this.place(event));
      this.draw();
    },
    end() {
      if (!this.current) return;
      this.pending.push(this.current);
      this.$emit("stroke", this.current);
      this.current = null;
      this.draw();
    },
    draw() {
      const pen = this.$refs.canvas?.getContext("2d");
      if (!pen) return;
      pen.clearRect(0, 0, this.width, this.height);
      pen.lineCap = pen.lineJoin = "round";
      pen.fillStyle = pen.strokeStyle = this.colour;
      if (this.below) pen.drawImage(this.below, 0, 0, this.width, this.height);
      for (const stroke of [...this.strokes, ...this.pending, ...(this.current ? [this.current] : [])]) {
        pen.globalCompositeOperation = stroke.tool === "erase" ? "destination-out" : "source-over";
        pen.lineWidth = stroke.tool === "outline" ? 2 : stroke.size * this.width;
        pen.beginPath();
        for (const [x, y] of stroke.points) pen.lineTo(x * this.width, y * this.height);
        if (stroke.points.length === 1) pen.lineTo(stroke.points[0][0] * this.width, stroke.points[0][1] * this.height);
        pen.stroke();
        if (stroke.tool === "outline" && stroke !== this.current) pen.fill();
      }
      pen.globalCompositeOperation = "source-over";
    },
  },
};
