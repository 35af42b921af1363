"""Preference pairs for helpfulness from HH-RLHF transcripts, made as pairs_harmless.py makes its own: all that fit.

    python pairs_helpful.py hh-rlhf-helpful-base-test.jsonl.gz pairs/

Several files may be given: each is held out by its own line numbers.
"""

from pairs_harmless import main

if __name__ == "__main__":
    main("helpful", __doc__, None)
