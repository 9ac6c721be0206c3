"""Routes of the tab: static files, and records as JSON."""

import functools
from pathlib import Path

from tensorboard import plugin_util
from tensorboard.backend import http_util
from tensorboard.plugins.base_plugin import FrontendMetadata, TBPlugin
from werkzeug import wrappers

from torch_dropout_ir_board.reading import ROUTES, answer

STATIC = Path(__file__).parent / "static"
_TYPES = {".js": "text/javascript", ".css": "text/css", "": "application/json"}


class BoardPlugin(TBPlugin):
    """Serves the tab."""

    plugin_name = "dropout_ir"

    def __init__(self, context):
        self._provider = context.data_provider

    def get_plugin_apps(self):
        """Return the routes."""
        names = [*ROUTES, *(file.name for file in STATIC.iterdir())]
        return {f"/{name}": functools.partial(self._serve, name) for name in names}

    def is_active(self):
        """Return False: TensorBoard looks for data of `data_plugin_names` itself."""
        return False

    def data_plugin_names(self):
        """Return the kinds of data that the tab reads."""
        return ("images", "histograms", "scalars")

    def frontend_metadata(self):
        """Return name and module of the tab."""
        return FrontendMetadata(es_module_path="/index.js", tab_name="Dropout IR")

    @wrappers.Request.application
    def _serve(self, name, request):
        env, of = request.environ, request.args.getlist("of")
        about = plugin_util.context(env), plugin_util.experiment_id(env)
        kind, status = _TYPES[Path(name).suffix], 200
        try:
            if name in ROUTES:
                content = answer(self._provider, *about, name, *of)
            else:
                content = (STATIC / name).read_bytes()
        except Exception as err:
            content = {"error": f"{type(err).__name__}: {err}"}
            kind, status = _TYPES[""], 404
        return http_util.Respond(request, content, kind, status)
