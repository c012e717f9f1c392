// Painting over a picture, run by gradio's HTML component with its `element`, `props`, `trigger` and `watch`. What is
// painted is black in the mask that the server gets beside the picture; both canvases have the pixels of the picture.
const picture = element.querySelector("img");
const shown = element.querySelector("canvas");
const brush = element.querySelector("input[type=range]");
const chosen = element.querySelector("input[type=file]");
const mask = document.createElement("canvas");
let last = null; // where the pointer was, while it paints
let painted = false;

function tell(more) {
    props.value = { picture: picture.src, mask: mask.toDataURL(), painted, ...more };
}

function clear() {
    for (const canvas of [shown, mask]) {
        canvas.width = picture.naturalWidth;
        canvas.height = picture.naturalHeight;
    }
    const pen = mask.getContext("2d");
    pen.fillStyle = "white";
    pen.fillRect(0, 0, mask.width, mask.height);
    painted = false;
    tell();
}

function stroke(event) {
    const box = shown.getBoundingClientRect();
    const here = [event.clientX - box.left, event.clientY - box.top].map((at) => (at * shown.width) / box.width);
    for (const [canvas, colour] of [[shown, "#d1495b"], [mask, "black"]]) {
        const pen = canvas.getContext("2d");
        pen.lineCap = "round";
        pen.lineWidth = (brush.value / 100) * shown.width;
        pen.strokeStyle = colour;
        pen.beginPath();
        pen.moveTo(...(last ?? here));
        pen.lineTo(here[0] + 0.01, here[1]); // a line without length may not be drawn at all
        pen.stroke();
    }
    last = here;
    painted = true;
}

function take() {
    // With a mask it is what was told here.
    if (props.value && !props.value.mask) picture.src = props.value.picture;
}

function end() {
    if (last) tell();
    last = null;
}

function read() {
    // The server makes a picture of the right size of it, or says what is wrong with it.
    const reader = new FileReader();
    reader.addEventListener("load", () => {
        tell({ file: reader.result });
        trigger("upload");
    });
    reader.readAsDataURL(chosen.files[0]);
    chosen.value = "";
}

chosen.addEventListener("change", read);
shown.addEventListener("pointerdown", (event) => {
    shown.setPointerCapture(event.pointerId);
    stroke(event);
});
shown.addEventListener("pointermove", (event) => {
    if (last) stroke(event);
});
shown.addEventListener("pointerup", end);
shown.addEventListener("pointercancel", end);
element.querySelector("button").addEventListener("click", clear);
picture.addEventListener("load", clear);
watch("value", take);
take();
