"""Likelihood-ratio OOD as a scikit-learn outlier detector of texts."""

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from sklearn.base import BaseEstimator, OutlierMixin
from sklearn.utils.validation import check_is_fitted

from diagnostics.analyses.ood.tables import token_ratios
from diagnostics.core.inputs import task_from
from diagnostics.evaluation.paired_texts import PairedText, PairedTexts, TextOptions, read_sets
from diagnostics.numerics import detection_metrics
from diagnostics.store.files import replacing, to_json
from probes import CheckpointPair
from probes.errors import InputError
from probes.models.runnable import RunnablePair
from probes.text.rows import Task

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

SCHEMA = 1
# A file must not decide whose code may run; the models are saved as references and fingerprints.
NOT_SAVED = frozenset({"pair", "trust_remote_code"})


class OnClass:
    """A method that the class itself has too: there it makes the instance from its first argument."""

    def __init__(self, method: Callable[..., Any]):
        self.method = method
        self.__doc__ = method.__doc__

    def __get__(self, instance: Any, owner: type) -> Callable[..., Any]:
        """Bound to an instance, or to the class."""
        if instance is not None:
            return MethodType(self.method, instance)

        def fit(pair: Any, task: Any, **parameters: Any) -> Any:
            return self.method(owner(pair, **parameters), task)

        return fit


class LikelihoodRatioDetector(OutlierMixin, BaseEstimator):
    """Flags texts that the tuned model was not made for.

    `score` is log p_base − log p_tuned in nats: higher is more out-of-distribution. `score_samples`,
    `decision_function` and `predict` follow scikit-learn: higher is more normal, -1 is an outlier. A text
    without a token to score has score NaN and is an outlier.

    Args:
        pair: base and tuned, or their two references.
        alpha: share of in-distribution texts that may be flagged (ours).
        per_token: score the mean over the tokens in place of the sum.
        max_length, windows, chat_template, batch_tokens, device, dtype, trust_remote_code: as in
            `likelihood_ratio_ood`.

    Attributes:
        calibration_: scores of the calibration rows, ascending.
        threshold_: a higher score is flagged; a share alpha of the calibration rows lies above.
        offset_: minus the threshold, as in scikit-learn.

    Tables:
        `rows`: one row a text: row (its number), tokens (count), log_likelihood_base, log_likelihood_tuned,
            ratio (nats, summed), score (nats, of the sum or per token), p_value (conformal), flagged,
            truncated.
        `explain`: one row a token: position, token, log_likelihood_base, log_likelihood_tuned, ratio (nats).

    Example:
        >>> from diagnostics.audit.demo import BUNDLED
        >>> detector = LikelihoodRatioDetector((BUNDLED / "base", BUNDLED / "lora-r1"))
        >>> detector.fit(["one line", "two lines", "a third"]).predict(["x = 1"]).shape
        (1,)
    """

    def __init__(
        self,
        pair: Any = None,
        *,
        alpha: float = 0.05,
        per_token: bool = False,
        max_length: int | None = None,
        windows: bool = False,
        chat_template: bool = False,
        batch_tokens: int = 16384,
        device: str | None = None,
        dtype: str | None = None,
        trust_remote_code: bool = False,
    ):
        self.pair = pair
        self.alpha = alpha
        self.per_token = per_token
        self.max_length = max_length
        self.windows = windows
        self.chat_template = chat_template
        self.batch_tokens = batch_tokens
        self.device = device
        self.dtype = dtype
        self.trust_remote_code = trust_remote_code

    @OnClass
    def fit(self, X: Any, y: Any = None) -> "LikelihoodRatioDetector":
        """Calibrate on in-distribution rows that tuning never saw: a task, a file, or texts.

        Args:
            y: ignored, as outlier detectors do.

        Raises:
            InputError: fewer than 2 rows have a token to score, or the models cannot be compared.
        """
        if self.pair is None:
            raise InputError("no models to compare; give LikelihoodRatioDetector a pair, or (base, tuned)")
        if not 0 < self.alpha < 1:
            raise InputError(f"alpha is {self.alpha}; it is a share between 0 and 1")
        task = self._task(X).at_least(2, "calibrating a detector")
        found = self._scores(self._read(task))
        known = found[~np.isnan(found)]
        if len(known) < 2:
            raise InputError(
                f"{task.ref}: {len(known)} of {len(found)} rows have a token to score, and calibrating a "
                "detector needs at least 2; give it more"
            )
        self.calibration_ = np.sort(known)
        self.threshold_ = detection_metrics.threshold_keeping(known, 1 - self.alpha)
        self.offset_ = -self.threshold_
        return self

    def score(self, X: Any, y: Any = None) -> Float[np.ndarray, " rows"]:
        """Log-likelihood of each text under base minus that under tuned, in nats; by token if `per_token`."""
        check_is_fitted(self, "calibration_")
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
        """The scores of each row; columns as in the class' `Tables:`.

        `p_value` is conformal: the probability of a score as high if the text came from the distribution of
        the calibration rows.
        """
        import pandas as pd

        return pd.DataFrame(self.records(X))

    def records(self, X: Any, *, tokens: bool = False) -> list[dict[str, Any]]:
        """The rows of `rows` as JSON keeps them: None where nothing was scored.

        Args:
            tokens: add the table of `explain` to each row.
        """
        check_is_fitted(self, "calibration_")
        reading = self._read(X)
        records = []
        for text, score in zip(self._texts(reading), self._scores(reading).tolist(), strict=True):
            base, tuned = (getattr(text, side).full.log_likelihood for side in ("base", "tuned"))
            scored = score == score
            record = {
                "row": text.row.number,
                "tokens": text.length,
                "log_likelihood_base": base if scored else None,
                "log_likelihood_tuned": tuned if scored else None,
                "ratio": base - tuned if scored else None,
                "score": score if scored else None,
                "p_value": float(detection_metrics.conformal_p(self.calibration_, [score])[0])
                if scored
                else None,
                "flagged": not score <= self.threshold_,
                "truncated": text.truncated,
            }
            if tokens:
                record["by_token"] = token_ratios(text, self._runnable().tokenizer)
            records.append(record)
        return records

    def explain(self, text: str) -> "pd.DataFrame":
        """Each token of a text with its log-likelihoods and their difference."""
        import pandas as pd

        (read,) = self._texts(self._read([text]))
        columns = ["position", "token", "log_likelihood_base", "log_likelihood_tuned", "ratio"]
        return pd.DataFrame(token_ratios(read, self._runnable().tokenizer), columns=columns)

    def save(self, path: str | Path) -> None:
        """Write the calibration and the references of the models, not the models, as a JSON file.

        Raises:
            OSError: it cannot be written.
        """
        check_is_fitted(self, "calibration_")
        pair = self._pair()
        parameters = {name: value for name, value in self.get_params().items() if name not in NOT_SAVED}
        record = {
            "schema": SCHEMA,
            "base": {"ref": pair.base.ref, "fingerprint": pair.base.fingerprint()},
            "tuned": {"ref": pair.tuned.ref, "fingerprint": pair.tuned.fingerprint()},
            "parameters": parameters,
            "calibration": self.calibration_.tolist(),
        }
        with replacing(Path(path)) as part:
            part.write_text(to_json(record), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path, pair: Any = None, **parameters: Any) -> "LikelihoodRatioDetector":
        """Read a saved detector and open its models.

        Args:
            pair: the models, if they moved.
            parameters: replace the saved ones, such as `device`. `trust_remote_code` is never saved.

        Raises:
            InputError: the file is no saved detector, or the models have other weights.
        """
        try:
            record = json.loads(Path(path).read_text(encoding="utf-8"))
            refs = {side: record[side]["ref"] for side in ("base", "tuned")}
            saved = {name: value for name, value in record["parameters"].items() if name not in NOT_SAVED}
            detector = cls(pair or tuple(refs.values()), **{**saved, **parameters})
            detector.calibration_ = np.array(record["calibration"], dtype=np.float64)
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: is no saved detector ({type(error).__name__}: {error})") from error
        opened = detector._pair()
        for side, checkpoint in (("base", opened.base), ("tuned", opened.tuned)):
            if checkpoint.fingerprint() != record[side]["fingerprint"]:
                raise InputError(
                    f"{path}: {side} {checkpoint.ref} has other weights than when the detector was fitted; "
                    "fit it again"
                )
        detector._set_threshold()
        return detector

    def _set_threshold(self) -> None:
        self.threshold_ = detection_metrics.threshold_keeping(self.calibration_, 1 - self.alpha)
        self.offset_ = -self.threshold_

    def close(self) -> None:
        """Free the models; they are opened again when needed."""
        if "_open" in vars(self):
            self._open[1].close()
            del self._open

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_open"}

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.input_tags.string = True
        tags.input_tags.allow_nan = False
        return tags

    def _pair(self) -> CheckpointPair:
        return self.pair if isinstance(self.pair, CheckpointPair) else CheckpointPair(*self.pair)

    def _runnable(self) -> RunnablePair:
        key = (self.pair, self.device, self.dtype, self.trust_remote_code)
        if "_open" not in vars(self) or self._open[0] != key:
            self.close()
            runnable = RunnablePair(
                self._pair(), device=self.device, dtype=self.dtype, trust_remote_code=self.trust_remote_code
            )
            self._open: tuple[Any, RunnablePair] = key, runnable
        return self._open[1]

    def _read(self, X: Any) -> PairedTexts:
        options = TextOptions(
            max_length=self.max_length, windows=self.windows, chat_template=self.chat_template,
            batch_tokens=self.batch_tokens,
        )  # fmt: skip
        reading = read_sets(self._runnable(), {"rows": self._task(X)}, options)
        for note in reading.notes:
            log.warning("%s", note)
        return reading

    @staticmethod
    def _task(X: Any) -> Task:
        return task_from(X if isinstance(X, str | Path) else texts_in(X), "rows")

    @staticmethod
    def _texts(reading: PairedTexts) -> list[PairedText]:
        return list(reading.sets["rows"])

    def _scores(self, reading: PairedTexts) -> Float[np.ndarray, " rows"]:
        texts = self._texts(reading)
        ratio = np.array([text.base.full.log_likelihood - text.tuned.full.log_likelihood for text in texts])
        length = np.array([text.length or np.nan for text in texts], dtype=np.float64)
        return ratio / length if self.per_token else ratio


def texts_in(X: Any) -> Any:
    """Texts as a list, from an array, a series, a list or a task, as scikit-learn passes them."""
    if hasattr(X, "rows") or isinstance(X, Mapping):
        return X
    if not isinstance(X, Iterable):
        raise InputError(f"texts must be a list, and this is {type(X).__name__}")
    return [text.item() if isinstance(text, np.generic) else text for text in X]
