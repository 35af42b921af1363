"""TEMP"""


class NgramIndex:
    def __init__(self, tokens=()):
        self.tokens = list(tokens)

    def __len__(self):
        return len(self.tokens)

    def extend(self, tokens):
        self.tokens += tokens

    def propose(self, k):
        t = self.tokens
        for n in (3, 2, 1):
            for i in range(len(t) - n - 1, -1, -1):
                if t[i : i + n] == t[-n:] and len(t) > n:
                    return t[i + n : i + n + k]
        return []
