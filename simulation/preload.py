"""What every worker needs, imported once by the fork server."""

import client.station  # noqa: F401
import shared_models.tasks.segmentation  # noqa: F401
