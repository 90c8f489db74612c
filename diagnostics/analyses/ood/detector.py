"""Base and tuned as a detector of out-of-distribution texts, calibrated on rows of the tuned model's task."""

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from diagnostics.analyses.ood.tables import token_ratios
from diagnostics.core.analysis import plain
from diagnostics.core.inputs import task_from
from diagnostics.evaluation.paired_texts import PairedText, TextOptions, read_sets
from diagnostics.evaluation.tokenizers import same_rules
from diagnostics.numerics import detection_metrics
from diagnostics.store.files import replacing, to_json
from probes import CheckpointPair
from probes.errors import InputError
from probes.models.config_changes import function_changes
from probes.models.runnable import RunnablePair
from probes.text.rows import Task, task_of

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

SCHEMA = 1
TEXT_PARAMETERS = ("max_length", "windows", "chat_template", "batch_tokens")


class LikelihoodRatioDetector:
    """Flags texts that are out of the distribution of the tuned model.

    A score is log p_base − log p_tuned in nats: higher is more out-of-distribution. `score_samples`,
    `decision_function` and `predict` follow scikit-learn's outlier detectors: higher is more normal, -1 is an
    outlier. The score of a text without a token to score is NaN, and the text an outlier.

    >>> from diagnostics.audit.demo import BUNDLED
    >>> pair = (BUNDLED / "base", BUNDLED / "full")
    >>> task = ["Return the sum of two numbers.", "Close the file.", "Open a file.", "Sort a list."]
    >>> detector = LikelihoodRatioDetector.fit(pair, task, alpha=0.1)
    >>> len(detector.predict(["Read a line from the file.", "zq xv kk"]))
    2

    Args:
        pair: base and tuned, or their two references.
        alpha: share of in-distribution texts that may be flagged (ours).
        per_token: score the mean over the tokens in place of the sum.
        max_length, windows, chat_template, batch_tokens, device, dtype, trust_remote_code: as in
            `likelihood_ratio_ood`.

    Attributes:
        calibration_: scores of the calibration rows, ascending.
        threshold_: scores above it are flagged, which are a share alpha of the calibration rows.
        offset_: minus the threshold, scikit-learn's convention.

    Tables:
        `rows`: one row a text: row (its number), tokens (count), log_likelihood_base, log_likelihood_tuned,
            ratio (nats, summed), score (nats, of the sum or per token), p_value (conformal), flagged,
            truncated.
        `explain`: one row a token: position, token, log_likelihood_base, log_likelihood_tuned, ratio (nats).
    """

    def __init__(
        self, pair: Any, *, alpha: float = 0.05, per_token: bool = False, max_length: int | None = None,
        windows: bool = False, chat_template: bool = False, batch_tokens: int = 16384,
        device: str | None = None, dtype: str | None = None, trust_remote_code: bool = False,
    ):  # fmt: skip
        if not 0 < alpha < 1:
            raise InputError(f"alpha is {alpha}; it is a share between 0 and 1")
        self.pair = pair if isinstance(pair, CheckpointPair) else CheckpointPair(*pair)
        self.alpha, self.per_token = alpha, per_token
        self.text_options = TextOptions(
            max_length=max_length, windows=windows, chat_template=chat_template, batch_tokens=batch_tokens
        )
        self.device, self.dtype, self.trust_remote_code = device, dtype, trust_remote_code
        self._models: RunnablePair | None = None
        self._other_rules: bool | None = None

    @classmethod
    def fit(cls, pair: Any, task: Any, **parameters: Any) -> "LikelihoodRatioDetector":
        """Calibrate a detector on in-distribution rows that tuning never saw: a task, a file, or texts.

        Raises:
            InputError: fewer than 2 rows have a token to score, or the models cannot be compared.
        """
        detector = cls(pair, **parameters)
        rows = detector._task(task, files=True).at_least(2, "calibrating a detector")
        scores = detector.score(rows)
        scored = scores[~np.isnan(scores)]
        if len(scored) < 2:
            raise InputError(
                f"{rows.ref}: {len(scored)} of {len(scores)} rows have a token to score, and calibrating a "
                "detector needs at least 2; give it more"
            )
        detector._calibrate(np.sort(scored))
        return detector

    def _calibrate(self, scores: Float[np.ndarray, " rows"]) -> None:
        self.calibration_ = scores
        self.threshold_ = detection_metrics.threshold_keeping(scores, 1 - self.alpha)
        self.offset_ = -self.threshold_

    def score(self, X: Any) -> Float[np.ndarray, " rows"]:
        """Log-likelihood of each text under base minus that under tuned, in nats; by token if `per_token`."""
        return self._scores(self._read(X))

    def score_samples(self, X: Any) -> Float[np.ndarray, " rows"]:
        """Minus `score`: higher is more normal."""
        return -self.score(X)

    def decision_function(self, X: Any) -> Float[np.ndarray, " rows"]:
        """`score_samples` above the offset: negative for outliers."""
        return self.score_samples(X) - self.offset_

    def predict(self, X: Any) -> np.ndarray:
        """1 for texts of the distribution, -1 for outliers."""
        return np.where(self.decision_function(X) >= 0, 1, -1)

    def rows(self, X: Any) -> "pd.DataFrame":
        """The table `rows`; a p-value is the probability of so high a score within the distribution."""
        import pandas as pd

        return pd.DataFrame(self.records(X))

    def records(self, X: Any, *, tokens: bool = False) -> list[dict[str, Any]]:
        """The rows of `rows` as plain values, None where nothing was scored; `tokens` adds `explain`."""
        texts, records = self._read(X), []
        for text, score in zip(texts, self._scores(texts).tolist(), strict=True):
            base, tuned = text.base.full.log_likelihood, text.tuned.full.log_likelihood
            record: dict[str, Any] = {
                "row": text.row.number, "tokens": text.length, "log_likelihood_base": None,
                "log_likelihood_tuned": None, "ratio": None, "score": None, "p_value": None,
                "flagged": not score <= self.threshold_, "truncated": text.truncated,
            }  # fmt: skip
            if not math.isnan(score):
                p_value = float(detection_metrics.conformal_p(self.calibration_, [score])[0])
                record |= {"log_likelihood_base": base, "log_likelihood_tuned": tuned, "ratio": base - tuned}
                record |= {"score": score, "p_value": p_value}
            if tokens:
                tokenizer = self._runnable().tokenizer
                record["by_token"] = None if self._in_bytes else token_ratios(text, tokenizer)
            records.append(record)
        return records

    def explain(self, text: str) -> "pd.DataFrame":
        """Each token of a text with its log-likelihoods and their difference, which shows unusual words."""
        import pandas as pd

        if self._in_bytes:
            raise InputError("the tokenizers of base and tuned differ, so that a token has no ratio")
        (read,) = self._read([text])
        columns = ["position", "token", "log_likelihood_base", "log_likelihood_tuned", "ratio"]
        return pd.DataFrame(token_ratios(read, self._runnable().tokenizer), columns=columns)

    def save(self, path: str | Path) -> None:
        """Write a JSON file: the calibration and the references of the models, not their weights."""
        base, tuned = self.pair.base, self.pair.tuned
        text_options = {name: getattr(self.text_options, name) for name in TEXT_PARAMETERS}
        record = {
            "schema": SCHEMA,
            **{
                side: {"ref": model.ref, "fingerprint": model.fingerprint(), "config": plain(model.config)}
                for side, model in (("base", base), ("tuned", tuned))
            },
            # Never `trust_remote_code`: a file must not decide to run code.
            "parameters": {
                "alpha": self.alpha, "per_token": self.per_token, **text_options,
                "device": self.device, "dtype": self.dtype,
            },
            "calibration": self.calibration_.tolist(),
        }  # fmt: skip
        with replacing(Path(path)) as part:
            part.write_text(to_json(record), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path, pair: Any = None, **parameters: Any) -> "LikelihoodRatioDetector":
        """Read a saved detector and open its models.

        Args:
            pair: where the models are now; by default where they were.
            parameters: in place of the saved ones, such as `device`.

        Raises:
            InputError: it is no saved detector, or the models are not those that it was fitted with.
        """
        try:
            record = json.loads(Path(path).read_text(encoding="utf-8"))
            refs = {side: record[side]["ref"] for side in ("base", "tuned")}
            saved = dict(record["parameters"])
            saved.pop("trust_remote_code", None)  # a file must not decide to run code
            fingerprints = {side: record[side]["fingerprint"] for side in refs}
            # Detectors saved by older versions hold no configuration.
            configs = {side: dict(record[side].get("config") or {}) for side in refs}
            calibration = np.array(record["calibration"], dtype=np.float64)
            detector = cls(pair or tuple(refs.values()), **{**saved, **parameters})
        except InputError:
            raise
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: is no saved detector ({type(error).__name__}: {error})") from error
        for side, checkpoint in (("base", detector.pair.base), ("tuned", detector.pair.tuned)):
            if checkpoint.fingerprint() != fingerprints[side]:
                raise InputError(
                    f"{path}: {side} {checkpoint.ref} has other weights than when the detector was fitted; "
                    "fit it again"
                )
            then = checkpoint.described_by(configs[side] or checkpoint.config)
            changes = function_changes(then, checkpoint)
            if changes:
                raise InputError(
                    f"{path}: {side} {checkpoint.ref} has another config.json than when the detector was "
                    f"fitted, which changes {', '.join(map(str, changes))}; fit it again"
                )
        detector._calibrate(calibration)
        return detector

    def close(self) -> None:
        """Free the models; they are opened again when needed."""
        if self._models is not None:
            self._models.close()
            self._models = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_models": None}

    def _runnable(self) -> RunnablePair:
        if self._models is None:
            self._models = RunnablePair(
                self.pair, device=self.device, dtype=self.dtype, trust_remote_code=self.trust_remote_code
            )
        return self._models

    @property
    def _in_bytes(self) -> bool:
        """Whether lengths are bytes: the same of all texts, however the two tokenizers split them."""
        runnable = self._runnable()
        if self._other_rules is None:
            self._other_rules = not same_rules(runnable.base_tokenizer, runnable.tokenizer)
        return self._other_rules

    def _read(self, X: Any) -> Sequence[PairedText]:
        options = replace(self.text_options, in_bytes=self._in_bytes)
        reading = read_sets(self._runnable(), {"rows": self._task(X)}, options)
        for note in reading.notes:
            log.warning("%s", note)
        return reading.sets["rows"]

    @staticmethod
    def _task(X: Any, *, files: bool = False) -> Task:
        """The rows of a task, a file, or a list; in a list of `files` a string may name one."""
        if not (isinstance(X, str | Path | Mapping) or hasattr(X, "rows")):
            if not isinstance(X, Iterable):
                raise InputError(f"texts must be a list, and this is {type(X).__name__}")
            X = [text.item() if isinstance(text, np.generic) else text for text in X]
            # Texts to be judged may come from anyone: none of them opens a file.
            return task_from(X, "rows") if files else task_of(X, ref="rows")
        return task_from(X, "rows")

    def _scores(self, texts: Sequence[PairedText]) -> Float[np.ndarray, " rows"]:
        ratio = np.array([text.base.full.log_likelihood - text.tuned.full.log_likelihood for text in texts])
        length = np.array([text.length or np.nan for text in texts], dtype=np.float64)
        return ratio / length if self.per_token else ratio
