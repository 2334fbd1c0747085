"""The page of `pmnet serve`: examples on the left, photos and what was found in them on the right."""

import asyncio
import os
import re
import signal
import socket
import tempfile
import threading
import webbrowser
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import uvicorn
from fastapi import FastAPI
from nicegui import app, events, run, ui
from nicegui.element import Element
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from pmnet.errors import PMNetError, SettingError
from pmnet.segment.presence import PRESENT
from pmnet.segment.segmenter import Segmenter
from pmnet.segment.session import MAX_FILES, Category, Example, Photo, Session, Stroke, colour, jpeg, tinted

T = TypeVar("T")
MEGABYTE = 1_000_000
MAX_BYTES, MAX_TOTAL = 50 * MEGABYTE, 500 * MEGABYTE  # of one file, and of those dropped at once
LOOPBACK = ("127.0.0.1", "localhost", "::1")
CLOSE = [{"label": "Close", "color": "white"}]
STYLE = """
  .nicegui-content { max-width: 1500px; margin: auto; padding: 24px; }
  .q-uploader { width: 100%; max-height: none; border: 2px dashed #8888; border-radius: 8px; }
  .q-uploader, .q-uploader__header { background: none; box-shadow: none; color: inherit; }
  .q-uploader--dnd, .q-uploader:hover { border-color: var(--q-primary); }
  .q-uploader__header { padding: 14px 8px; }
  .q-uploader__title { font-weight: normal; font-size: 1rem; }
  .q-uploader__list, .q-uploader__subtitle { display: none; }
  .paint { position: relative; line-height: 0; border-radius: 6px; overflow: hidden; }
  .paint img { width: 100%; }
  .paint canvas { position: absolute; inset: 0; width: 100%; height: 100%; opacity: 0.55; touch-action: none; }
  .dot { width: 14px; height: 14px; border-radius: 50%; flex: none; }
  .found { width: 100%; border-radius: 6px; cursor: zoom-in; }
"""


class Paint(Element, component="paint.js"):
    """An example's photo, to paint its mask on.

    Args:
        example: it.
        tint: red, green and blue of the mask, 0..255.
        tool: see `Stroke`.
        size: see `Stroke`.
    """

    def __init__(self, example: Example, tint: tuple[int, int, int], tool: str, size: float) -> None:
        super().__init__()
        self.example, self.tint = example, tint
        width, height = example.preview.size
        self._props.update(photo=jpeg(example.preview), width=width, height=height, tool=tool, size=size)
        self._props["colour"] = css(tint)
        self.show()

    def show(self) -> None:
        """Draws the mask of the example."""
        base = self.example.base
        self._props["base"] = "" if base is None else tinted(base, self.example.preview.size, self.tint)
        self._props["strokes"] = list(self.example.strokes)
        self.update()


class Page:
    """What one tab shows.

    Args:
        session: what the tab works on.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.paints: list[Paint] = []
        self.cards: list[PhotoCard] = []
        self.busy = False
        ui.add_css(STYLE)
        with ui.row().classes("w-full items-baseline"):
            ui.label("Segment by example").classes("text-2xl font-medium")
            ui.label(f"head {session.segmenter.recipe['name']}, on {session.segmenter.device.type}").classes(
                "opacity-60"
            )
        with ui.grid().classes("w-full grid-cols-1 md:grid-cols-[minmax(320px,440px)_1fr] gap-6 items-start"):
            with ui.column().classes("w-full gap-3"):
                self.build_examples()
            with ui.column().classes("w-full gap-3"):
                self.build_photos()
        self.list_classes()
        self.list_photos()

    # Layout

    def build_examples(self) -> None:
        heading(
            1,
            "Show the object",
            "Drop one or a few photos and paint the object in each. If you have masks, drop them too: NAME.png or "
            "NAME_mask.png belongs to NAME.jpg.",
        )
        with ui.row().classes("w-full items-center gap-4 no-wrap") as self.tools:
            choices = {"brush": "Brush", "outline": "Outline", "erase": "Erase"}
            self.tool = ui.toggle(choices, value="brush", on_change=self.choose).props(
                "no-caps unelevated padding='6px 12px'"
            )
            self.size = ui.slider(min=0.01, max=0.2, step=0.005, value=0.05, on_change=self.choose)
            self.size.tooltip("Width of the brush")
        self.classes = ui.column().classes("w-full gap-6")
        add = ui.button("Another class", icon="add", on_click=self.add_class).props("no-caps flat padding='4px 8px'")
        add.tooltip("To find several kinds of objects at once, each in its colour")

    def build_photos(self) -> None:
        heading(
            2,
            "Find it in photos",
            "The object is marked in each photo. A lower threshold takes in more, a higher one less; photos are not "
            "segmented again for that.",
        )
        self.drop("Photos to segment", self.drop_photos).mark("photos")
        with ui.row().classes("w-full items-center gap-6"):
            self.button = ui.button("Segment", on_click=self.segment).props("no-caps unelevated")
            with ui.row().classes("items-center no-wrap grow gap-4"):
                label = ui.label().classes("whitespace-nowrap")
                self.threshold = ui.slider(min=0.01, max=0.99, step=0.01, value=0.5, on_change=self.redraw)
                self.threshold.classes("grow")
                label.bind_text_from(self.threshold, "value", lambda value: f"Threshold {value:.2f}")
            self.absent = ui.switch("Show masks where it seems absent too", on_change=self.redraw)
        self.hint = ui.label("The examples changed: press Segment.").classes("text-primary")
        with ui.row().classes("items-center gap-3"):
            ui.label("Save")
            save = ui.button("Masks (.zip)", icon="download", on_click=self.save_masks).props("no-caps outline")
            save.tooltip(
                "One PNG for each photo, at the photo's size: 0 = none, 1 = the first class, 2 = the second, ..."
            )
            save = ui.button("Class file", icon="download", on_click=self.save_class).props("no-caps outline")
            save.tooltip("The method and your examples in one file, for Segmenter.load and pmnet segment --classes")
        self.photos = ui.grid().classes("w-full grid-cols-1 sm:grid-cols-2 xl:grid-cols-3 gap-4")

    def drop(self, label: str, handler: events.Handler[events.MultiUploadEventArguments]) -> ui.upload:
        """A place to drop files."""
        return ui.upload(
            label=f"{label}: drop them here, or press +",
            multiple=True, auto_upload=True, max_file_size=MAX_BYTES, max_total_size=MAX_TOTAL, max_files=MAX_FILES,
            on_multi_upload=handler, on_rejected=rejected,
        ).props("flat")  # fmt: skip

    async def stored(self, event: events.MultiUploadEventArguments) -> list[tuple[str, Path]]:
        """Writes uploads into the session's folder. Returns the name and the place of each.

        Raises:
            SettingError: a file is too large; the browser asks for permission first, other programs may not.
        """
        for file in event.files:
            if file.size() > MAX_BYTES:
                raise SettingError(f"{file.name} has more than {MAX_BYTES // MEGABYTE} MB: reduce it.")
        files = [(file, self.session.place()) for file in event.files]
        for file, path in files:
            await file.save(path)
        return [(file.name, path) for file, path in files]

    # Classes and their examples

    def list_classes(self) -> None:
        self.classes.clear()
        self.paints = []
        with self.classes:
            for number, category in enumerate(self.session.categories, start=1):
                self.class_card(number, category)
        self.tools.set_visibility(bool(self.paints))
        self.show_changed()

    def class_card(self, number: int, category: Category) -> None:
        several = len(self.session.categories) > 1
        with ui.column().classes("w-full gap-3"):
            with ui.row().classes("w-full items-center gap-2 no-wrap"):
                ui.element("span").classes("dot").style(f"background: {css(colour(number))}")
                name = ui.input("Name of the object", value=category.name).classes("grow")
                name.on_value_change(lambda event: self.rename(category, event.value))
                if several:
                    small_button("Remove", lambda: self.remove_class(category), "Remove this class")
            self.drop("Example photos", lambda event: self.drop_examples(event, category)).mark("examples")
            for example in category.examples:
                self.paints.append(self.example_card(example, category, colour(number)))
            if category.given and not category.examples:
                ui.label("From the class file. Examples take its place.").classes("opacity-70")

    def example_card(self, example: Example, category: Category, tint: tuple[int, int, int]) -> Paint:
        with ui.column().classes("w-full gap-1"):
            paint = Paint(example, tint, self.tool.value, self.size.value)
            paint.on("stroke", lambda event: self.painted(paint, event.args)).classes("w-full")
            with ui.row().classes("w-full items-center gap-1 no-wrap"):
                ui.label(example.name).classes("grow truncate opacity-70")
                file = ui.upload(
                    auto_upload=True, max_file_size=MAX_BYTES, on_rejected=rejected,
                    on_multi_upload=lambda event: self.drop_mask(event, paint),
                ).classes("hidden").mark("mask")  # fmt: skip
                small_button("Mask file", lambda: file.run_method("pickFiles"), "Take the mask from a file")
                small_button("Undo", lambda: self.undo(paint, 1))
                small_button("Clear", lambda: self.undo(paint, len(example.strokes), True))
                small_button("Remove", lambda: self.remove_example(category, example))
        return paint

    def add_class(self) -> None:
        self.session.add_category()
        self.list_classes()

    async def remove_class(self, category: Category) -> None:
        self.session.remove_category(category)
        self.list_classes()
        await self.redraw()

    def rename(self, category: Category, name: str | None) -> None:
        category.name = name or ""
        for card in self.cards:
            card.describe()

    async def drop_examples(self, event: events.MultiUploadEventArguments, category: Category) -> None:
        with told():
            await aside(self.session.add_examples, category, await self.stored(event))
        event.sender.run_method("reset")
        self.list_classes()

    async def drop_mask(self, event: events.MultiUploadEventArguments, paint: Paint) -> None:
        with told():
            for name, path in await self.stored(event):
                await aside(self.session.add_mask, paint.example, name, path)
        event.sender.run_method("reset")
        self.show_changed()
        paint.show()

    def painted(self, paint: Paint, stroke: Stroke) -> None:
        paint.example.strokes.append(stroke)
        self.touched()
        paint.show()

    def undo(self, paint: Paint, count: int, base: bool = False) -> None:
        """Takes back the last strokes, and the uploaded mask too if `base`."""
        del paint.example.strokes[len(paint.example.strokes) - count :]
        paint.example.base = None if base else paint.example.base
        self.touched()
        paint.show()

    def remove_example(self, category: Category, example: Example) -> None:
        category.examples.remove(example)
        self.touched()
        self.list_classes()

    def touched(self) -> None:
        """The examples changed."""
        self.session.changed = True
        self.show_changed()

    def show_changed(self) -> None:
        self.hint.set_visibility(self.session.changed and bool(self.session.photos))

    def choose(self) -> None:
        for paint in self.paints:
            paint.props["tool"], paint.props["size"] = self.tool.value, self.size.value

    # Photos

    async def drop_photos(self, event: events.MultiUploadEventArguments) -> None:
        with told():
            await aside(self.session.add_photos, await self.stored(event))
        event.sender.run_method("reset")
        self.list_photos()
        self.show_changed()
        if self.session.ready:
            await self.segment()

    def list_photos(self) -> None:
        """Adds cards of the photos that have none."""
        with self.photos:
            self.cards += [PhotoCard(self, photo) for photo in self.session.photos[len(self.cards) :]]

    async def segment(self) -> None:
        """Shows the examples to the method if they changed, and segments the photos that need it."""
        if self.busy:
            return  # whatever runs takes new photos too
        self.busy = True
        self.button.props("loading")
        try:
            with told():
                if not self.session.ready:
                    await aside(self.session.fit)
                    self.show_changed()
                    await self.redraw()
                if not self.cards:
                    ui.notify("Ready: now drop photos to segment.")
                while self.session.ready and (card := next((c for c in self.cards if not c.photo.pieces), None)):
                    await aside(self.session.segment, card.photo)
                    await card.draw()
        finally:
            self.busy = False
            self.button.props(remove="loading")

    async def redraw(self) -> None:
        """Draws all masks with the threshold; nothing is predicted again."""
        wanted = self.setting
        for card in self.cards:
            if self.setting != wanted:
                return  # the slider moved on
            await card.draw()

    @property
    def setting(self) -> tuple[float, bool]:
        return self.threshold.value, self.absent.value

    async def save_masks(self) -> None:
        with told():
            ui.download.file(await aside(self.session.masks, *self.setting), "masks.zip")

    async def save_class(self) -> None:
        with told():
            file = await aside(self.session.class_file)
            ui.download.file(file, file.name)


class PhotoCard:
    """A photo with what was found in it."""

    def __init__(self, page: Page, photo: Photo) -> None:
        self.page, self.photo = page, photo
        with ui.column().classes("w-full gap-0") as self.card:
            self.picture = ui.element("img").classes("found").on("click", self.enlarge)
            with ui.row().classes("w-full items-center gap-1 no-wrap"):
                ui.label(photo.name).classes("grow truncate opacity-70")
                small_button("Remove", self.remove)
            with ui.label().classes("whitespace-pre-line") as self.found:
                self.facts = ui.tooltip("")
        self.show(*self.drawn())

    async def draw(self) -> None:
        self.show(*await aside(self.drawn))

    def drawn(self) -> tuple[str, list[float]]:
        image, shares = self.photo.overlay(*self.page.setting)
        return jpeg(image), shares

    def show(self, picture: str, shares: list[float]) -> None:
        self.picture.props["src"] = picture
        self.shares = shares
        self.describe()

    def describe(self) -> None:
        """Writes what was found, below the photo."""
        names = [category.name for category in self.page.session.categories]
        presences = self.photo.presences
        found = [
            self.says(share, presence) if len(names) == 1 else f"{name}: {self.says(share, presence)}"
            for name, share, presence in zip(names, self.shares, presences, strict=False)  # a class may be new
        ]
        self.found.text = "\n".join(found) or "not segmented yet"
        presence = ", ".join(f"{value:.2f}" for value in presences)
        self.facts.text = (
            f"{self.photo.name}: presence {presence}, segmented in {self.photo.seconds:.2f} s"
            if presences
            else self.photo.name
        )

    def says(self, share: float, presence: float) -> str:
        found = f"{share:.1%} of the photo"
        if presence >= PRESENT:
            return found
        return f"seems absent, {found}" if self.page.absent.value else "seems absent"

    async def enlarge(self) -> None:
        picture = jpeg(await aside(self.photo.large, *self.page.setting))
        with ui.dialog(value=True).props("maximized") as dialog, ui.card().classes("items-center justify-center"):
            shown = ui.element("img").classes("cursor-zoom-out").on("click", dialog.close)
            shown.style("max-width: 100%; max-height: 100%").props["src"] = picture
        dialog.on("hide", dialog.delete)

    def remove(self) -> None:
        self.page.session.photos.remove(self.photo)
        self.page.cards.remove(self)
        self.card.delete()


def heading(number: int, title: str, text: str) -> None:
    with ui.row().classes("items-center gap-3"):
        with ui.avatar(size="32px", font_size="18px", color="primary", text_color="white"):
            ui.label(f"{number}")
        ui.label(title).classes("text-lg font-medium")
    ui.label(text).classes("opacity-70")


def css(tint: tuple[int, int, int]) -> str:
    """A colour as style sheets write it."""
    return f"rgb{tint}"


def small_button(text: str, handler: events.Handler[events.ClickEventArguments], tooltip: str = "") -> None:
    button = ui.button(text, on_click=handler).props("flat dense no-caps padding='0 6px'")
    if tooltip:
        button.tooltip(tooltip)


async def aside(function: Callable[..., T], *arguments: Any) -> T:
    """Runs a function in a thread, so that the page goes on."""
    return await asyncio.get_running_loop().run_in_executor(run.thread_pool, function, *arguments)


def rejected() -> None:
    say(f"Not uploaded: at most {MAX_FILES} files at once, of at most {MAX_BYTES // MEGABYTE} MB each.")


@contextmanager
def told() -> Iterator[None]:
    """Shows an error as one message on the page."""
    try:
        yield
    except PMNetError as error:
        say(str(error))
    except Exception as error:
        say(f"An unexpected error ({error or type(error).__name__}); the terminal says more.")
        raise


def say(message: str) -> None:
    ui.notify(message, type="negative", position="top", multi_line=True, timeout=15_000, actions=CLOSE)


# The server


class Guard:
    """Refuses requests that other sites make through the browser, and those that are too large.

    Args:
        hosts: names by which the server may be called; none allows all.
    """

    def __init__(self, app: ASGIApp, hosts: tuple[str, ...]) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self.refusal(Headers(scope=scope)) if scope["type"] in ("http", "websocket") else None
        await (refusal or self.app)(scope, receive, send)

    def refusal(self, headers: Headers) -> PlainTextResponse | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        length = headers.get("content-length", "0" if "transfer-encoding" not in headers else "unknown")
        if self.hosts and re.sub(r":\d+$", "", host).strip("[]") not in self.hosts:
            return PlainTextResponse("This name is not served.", 403)
        if origin and origin.partition("://")[2] != host:
            return PlainTextResponse("Other sites may not use this page.", 403)
        if not length.isdecimal() or int(length) > MAX_TOTAL + MEGABYTE:
            return PlainTextResponse("Too large.", 413)
        return None


def serve(segmenter: Segmenter, host: str, port: int, browser: bool) -> None:
    """Serves the page until SIGINT or SIGTERM, and ends the process.

    Args:
        segmenter: its method serves all tabs.
        host: address to listen at.
        port: 0 takes any free one.
        browser: open the page in the browser.

    Raises:
        SettingError: the address cannot be used.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if hasattr(signal, "SIGHUP"):  # the terminal was closed
        signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
    lock = threading.Lock()
    try:
        with TemporaryDirectory(prefix="pmnet-") as folder, listening(host, port) as listener:
            tempfile.tempdir = folder  # where large uploads go first
            server = uvicorn.Server(
                uvicorn.Config(
                    application(segmenter, Path(folder), lock, () if host not in LOOPBACK else LOOPBACK),
                    log_level="warning", ws="wsproto", timeout_graceful_shutdown=1,
                )
            )  # fmt: skip
            name = f"[{host}]" if ":" in host else host
            address = f"http://{name}:{listener.getsockname()[1]}/"
            print(f"The page is at {address} (Ctrl-C ends it).", flush=True)
            if browser:
                threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
            server.run(sockets=[listener])
    except KeyboardInterrupt:
        pass
    finally:
        tempfile.tempdir = None
    print("The page is closed.", flush=True)
    os._exit(0)  # at once: a photo in work would keep the process until it is done


def application(segmenter: Segmenter, folder: Path, lock: threading.Lock, hosts: tuple[str, ...]) -> FastAPI:
    """The server's program: one session for each tab, which survives a reload."""
    sessions: dict[str, Session] = {}

    @ui.page("/")
    async def page() -> None:
        client = ui.context.client
        await client.connected()
        tab = app.storage.tab
        if "session" not in tab:
            tab["session"] = f"{len(sessions)}"
            sessions[tab["session"]] = Session(segmenter, folder / tab["session"], lock)
        Page(sessions[tab["session"]])

    outer = FastAPI(openapi_url=None)
    outer.add_middleware(Guard, hosts=hosts)
    ui.run_with(
        outer, title="PMNet", dark=None, message_history_length=0, show_welcome_message=False, reconnect_timeout=30
    )
    return outer


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """Raises SettingError where the address cannot be used."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise SettingError(f"Cannot listen at {host}, port {port}: {error}. Choose another one with --port.") from error
    with listener:
        yield listener
