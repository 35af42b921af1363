"""The task's metric: how positive VADER finds a text, from -1 to 1."""

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

analyser = SentimentIntensityAnalyzer()


def process_results(doc: dict, results: list) -> dict:
    return {"mood": analyser.polarity_scores(results[0])["compound"]}
