"""codecarbon beside our meter: an independent witness, configured in full, whose reading is one
fact at the end.

Offline, with the country, carbon intensity and memory power given (it would guess 20 W of memory,
and a place); in process mode every 15 s; no file, no lock; on rank 0 only. It starts before our
first reading and stops after our last, so that the seconds it needs to import are not the run's.
"""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Mapping
from typing import Any

from greenvis.meters.grid import lookup
from greenvis.meters.processes import open_tree

INTERVAL_S = 15
KWH = 3.6e6


class CrossCheck:
    """A running codecarbon tracker, or the reason there is none (`problem`)."""

    def __init__(self, header: Mapping[str, Any]) -> None:
        self.problem = ""
        self._tracker: Any = None
        if header.get("rank", 0) != 0:
            return
        try:
            package = importlib.import_module("codecarbon")
            # after the import, which sets its own
            logging.getLogger("codecarbon").setLevel(logging.ERROR)
            self._version = str(package.__version__)
            self._tracker = package.OfflineEmissionsTracker(
                country_iso_code=_country(header), tracking_mode="process",
                measure_power_secs=INTERVAL_S,
                force_carbon_intensity_g_co2e_kwh=header["carbon_intensity"]["value"],
                force_ram_power=_ram_w(header),
                pue=header.get("pue", 1.0), allow_multiple_runs=True, save_to_file=False,
                log_level="error",
            )  # fmt: skip
            self._tracker.start()
        except Exception as error:  # a witness that fails must not end the training
            self._tracker, self.problem = (
                None,
                f"codecarbon could not start: {type(error).__name__}: {error}",
            )

    def stop(self) -> dict[str, Any] | None:
        """Stop and return the fact: energy_j and its parts, carbon_g, duration_s and its settings;
        None where it failed."""
        if self._tracker is None:
            return None
        try:
            self._tracker.stop()
            data = self._tracker.final_emissions_data
            return {
                "energy_j": data.energy_consumed * KWH, "cpu_j": data.cpu_energy * KWH,
                "ram_j": data.ram_energy * KWH,
                "gpu_j": data.gpu_energy * KWH, "carbon_g": data.emissions * 1000,
                "duration_s": data.duration,
                "version": self._version, "tracking_mode": "process", "interval_s": INTERVAL_S,
            }  # fmt: skip
        except Exception as error:  # as above
            self.problem = f"codecarbon could not stop: {type(error).__name__}: {error}"
            return None
        finally:
            self._tracker = None


def _country(header: Mapping[str, Any]) -> str:
    """Return the ISO-3 code codecarbon needs (its intensity is given apart): the zone's country, or
    any it knows."""
    zone = str(header["carbon_intensity"].get("zone", ""))[:3]
    return zone if re.fullmatch("[A-Z]{3}", zone) and lookup(zone) else "FRA"


def _ram_w(header: Mapping[str, Any]) -> float:
    """Return the watts our own model gives the memory in use now; codecarbon takes a constant."""
    ram = next(
        (c for c in header.get("components") or [] if c["name"] == "ram" and c["source"] != "rapl"),
        None,
    )
    return max(0.01, open_tree().resident_gb() * ram["coefficient"]["central"]) if ram else 0.01
