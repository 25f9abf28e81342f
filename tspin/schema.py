"""Names of columns that tspin writes and analysis reads; nothing here needs torch."""

RUN = ["method", "seed", "iteration"]

# results/<preset>/studies/<name>.csv: the settings, by the last part of their keys; RUN; and these.
STUDY_MEASURES = ["avg", "avg_se", "mean_tokens", "end_token_share"]  # percent; y′ of the iteration: tokens, share
