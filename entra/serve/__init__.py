"""An HTTP scorer for every engine that can POST: `entra serve`. Only `app` and `queue` need the extra `serve`."""
