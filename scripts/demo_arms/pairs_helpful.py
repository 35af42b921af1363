"""Makes preference pairs for helpfulness from HH-RLHF transcripts, like pairs_harmless.py, but of all pairs that fit.

    python pairs_helpful.py hh-rlhf-helpful-base-test.jsonl.gz pairs/

Several files may be given. The held-out lines of each are chosen by the line numbers within that file.
"""

from pairs_harmless import main

if __name__ == "__main__":
    main("helpful", __doc__, None)
