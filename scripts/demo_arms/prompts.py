"""Short chat prompts for the demo models: a training pool and a held-out list, disjoint in their subjects."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

SEED = 2410
HELD_OUT_SUBJECTS = 4  # subjects per domain that no training prompt of the domain mentions
HELD_OUT = 128


def _words(text: str) -> list[str]:
    return [phrase.strip() for phrase in text.split(",")]


# Maps a domain to (templates, subjects).
DOMAINS: dict[str, tuple[list[str], list[str]]] = {
    "film": (
        [
            "What did you think of {}?",
            "Write a short review of {}.",
            "Give me your opinion of {} in a few sentences.",
            "Is it worth watching {}?",
            "My friend hated {}. What would you say to them?",
            "Describe the acting in {}.",
            "How was {}? I am thinking of seeing it tonight.",
            "Tell me about the ending of {}.",
        ],
        _words(
            "a slow black-and-white drama, the latest superhero film, a low-budget horror film, a silent comedy, "
            "a three-hour war film, a romantic comedy set in Paris, a documentary about penguins, a spy thriller, "
            "an animated film about toys, a musical about a circus, a courtroom drama, a film about chess "
            "players, the sequel of a famous space adventure, a western with an old sheriff, a zombie film, a "
            "film about two sisters, a crime series with ten episodes, a remake of a classic monster film, a "
            "biography of a painter, a film about a lost dog, a heist film, a fantasy film with dragons, a time "
            "travel film, a sports film about boxing, a film about a small village, an experimental film without "
            "dialogue, a comedy about a wedding, a disaster film, a film about a teacher, a mystery set on a "
            "train, a film about robots, a family film at Christmas, a film about a rock band, a film about a "
            "shipwreck, a political satire, a film about a long friendship"
        ),
    ),
    "book": (
        [
            "Should I read {}?",
            "Review {} for a newspaper.",
            "What makes {} good or bad?",
            "Recommend {} to a friend in one paragraph.",
            "I just finished {}. How should I feel about it?",
            "Write the blurb on the back cover of {}.",
        ],
        _words(
            "a long Russian novel, a detective story, a cookbook by a famous chef, a book of short poems, a "
            "history of Rome, a science fiction novel about Mars, a self-help book about habits, a children's "
            "book about a bear, a diary of a sailor, a graphic novel about a city, a biography of a scientist, a "
            "book about gardening, a ghost story, a novel about three generations, a travel book about Japan, a "
            "textbook of algebra, a collection of fairy tales, a novel told in letters, a book about the deep "
            "sea, a satire about office life, a thriller about a stolen painting, a book about sleep, a romance "
            "in a small town, a book about birds, an essay on solitude, a novel about a lighthouse, a guide to "
            "good manners, a book about the brain"
        ),
    ),
    "food": (
        [
            "What do you think of {}?",
            "How do I make {} at home?",
            "Describe the taste of {}.",
            "Write a review of a restaurant that serves {}.",
            "What goes well with {}?",
            "Is {} healthy?",
            "I have never tried {}. What should I know?",
        ],
        _words(
            "tomato soup, sushi, black coffee, blue cheese, banana bread, fried rice, apple pie, lentil curry, "
            "pizza with pineapple, green tea, roast chicken, pumpkin soup, fish tacos, chocolate cake, kimchi, "
            "scrambled eggs, mushroom risotto, hummus, potato salad, grilled vegetables, pancakes, onion rings, "
            "lemonade, beef stew, spinach lasagne, oatmeal, miso soup, garlic bread, rice pudding, a veggie "
            "burger, ice cream, pickled cucumbers, dark rye bread, noodle soup, cherry jam, avocado toast, peanut "
            "butter, falafel"
        ),
    ),
    "travel": (
        [
            "Tell me about a holiday in {}.",
            "What should I see in {}?",
            "Write a short review of a hotel in {}.",
            "Is {} a good place for families?",
            "Plan one day in {}.",
            "Why do people visit {}?",
            "What should I pack for {}?",
        ],
        _words(
            "Lisbon, Tokyo, the Alps, Iceland, Morocco, New York, a small Greek island, Venice, Kenya, Peru, "
            "Vancouver, Berlin, the Scottish Highlands, Thailand, Cairo, Mexico City, the Norwegian coast, "
            "Sydney, Vienna, Istanbul, Cuba, Prague, New Zealand, Hawaii, Rome in August, a desert camp, Dublin, "
            "Seoul, Barcelona, Nepal, Chicago in winter, Copenhagen, the Black Forest, Buenos Aires, a lake in "
            "Finland, Amsterdam"
        ),
    ),
    "explain": (
        [
            "Explain {} in simple words.",
            "What is {}?",
            "Why is {} important?",
            "Explain {} to a ten-year-old.",
            "Give me three facts about {}.",
            "What is a common mistake people make about {}?",
            "Summarise what is known about {}.",
            "Write one sentence about {}.",
        ],
        _words(
            "gravity, photosynthesis, inflation, the water cycle, machine learning, the French Revolution, "
            "vaccines, black holes, supply and demand, evolution, the internet, electricity, democracy, the moon, "
            "plate tectonics, antibiotics, the solar system, compound interest, DNA, the greenhouse effect, prime "
            "numbers, the Roman Empire, sound waves, a blockchain, the human heart, rainbows, magnetism, the "
            "stock market, volcanoes, probability, the Silk Road, bacteria, a neural network, tides, the "
            "Renaissance, friction, an algorithm, the printing press, coral reefs, atoms, the Cold War, "
            "cholesterol, lightning, fractions, the periodic table, jazz, perspective in painting, a haiku, "
            "recycling, the immune system, fossils, relativity"
        ),
    ),
    "howto": (
        [
            "How do I {}?",
            "Give me a step by step guide to {}.",
            "What is the easiest way to {}?",
            "List five tips to {}.",
            "I want to {}. Where do I start?",
            "What should I avoid when I {}?",
        ],
        _words(
            "learn the guitar, fix a flat tyre, clean an oven, write a cover letter, grow tomatoes, save money "
            "every month, train a puppy, paint a wall, fall asleep faster, learn Spanish, remove a stain from a "
            "shirt, start running, organise a birthday party, sharpen a knife, build a bookshelf, take better "
            "photos, give a short speech, repair a bicycle chain, write a poem, prepare for a job interview, back "
            "up my computer, bake bread, iron a shirt, plant a tree, study for an exam, knit a scarf, meditate, "
            "make new friends, cook rice, unclog a sink, set up a small website, read more books, swim better, "
            "plan a budget, learn to draw, wrap a present, keep houseplants alive, tie a bow tie, write clear "
            "emails, stop biting my nails"
        ),
    ),
    "advice": (
        [
            "{}. What should I do?",
            "{}. Any advice?",
            "I feel bad because of this: {}. Please help.",
            "{}. How would you handle it?",
            "Write a kind message to someone who says: {}.",
        ],
        _words(
            "My neighbour plays loud music at night, I forgot my best friend's birthday, I am nervous about my "
            "first day at work, My cat does not eat, I failed an exam, My sister and I argue all the time, I "
            "cannot decide between two jobs, I spend too much time on my phone, My boss ignores my ideas, I lost "
            "my wallet, I want to move to another city, My roommate never cleans, I am bored at weekends, I have "
            "trouble saying no, My train was cancelled, I am learning to drive and I am scared, My garden is full "
            "of weeds, I have a cold, I broke a vase at a friend's house, My laptop is very slow, I cannot stop "
            "worrying about money, My children do not want to read, I was late for an important meeting, I miss "
            "my home town, I want to eat less sugar, My colleague takes credit for my work, I do not know what to "
            "cook tonight, I am tired all the time, My friend borrowed money and did not return it, I have to "
            "give a toast at a wedding, I want to quit smoking, I bought a coat and regret it"
        ),
    ),
    "story": (
        [
            "Write the beginning of a story about {}.",
            "Tell me a short story about {}.",
            "Write a poem about {}.",
            "Once upon a time there was {}. Continue.",
            "Write two sentences about {}.",
            "Describe {}.",
        ],
        _words(
            "a lonely robot, a boy who finds a key, an old fisherman, a dragon that fears fire, a town without "
            "clocks, two rival bakers, a cat that can talk, a girl on a night train, a forgotten garden, a king "
            "who loses his crown, a letter that arrives too late, a storm at sea, the last tree on earth, a "
            "detective with a bad memory, a snowman in spring, a mouse in a library, a pianist with one hand, a "
            "house on a hill, a visitor from the future, a broken lighthouse, a fox and a crow, a farmer and the "
            "moon, a painter who sees in grey, a bridge between two worlds, a summer evening, a busy market, an "
            "empty theatre, a long winter, a street musician, a mountain at dawn, a secret door, a wise old "
            "turtle"
        ),
    ),
    "list": (
        [
            "List five {}.",
            "Name three {} and say why you chose them.",
            "What are the best {}?",
            "Give me ideas for {}.",
            "What are the worst {}?",
        ],
        _words(
            "indoor hobbies, gifts for a grandmother, names for a dog, board games, healthy snacks, uses for an "
            "old jar, farm animals, European capitals, musical instruments, colours of autumn, ways to relax, "
            "kitchen tools, famous inventors, winter sports, words for happy, things to do in the rain, summer "
            "vegetables, subjects at school, team games, questions for a first date, reasons to learn a language, "
            "small habits for the morning, insects, planets, desserts, jobs with animals, car games, programming "
            "languages, ways to save water, titles for a novel, excuses for being late, books for teenagers"
        ),
    ),
    "everyday": (
        [
            "Good morning! {}",
            "{}",
            "Answer in one sentence: {}",
            "Quick question: {}",
            "My son asked me this: {}",
        ],
        _words(
            "How many days are in a year?, What is the capital of France?, Why is the sky blue?, What time do "
            "most shops close?, How much water should I drink?, Do fish sleep?, What is 12 times 8?, Who wrote "
            "Hamlet?, How far is the moon?, What does a mechanic do?, Which is bigger: a whale or an elephant?, "
            "How do planes fly?, Can you tell me a joke?, What day comes after Thursday?, Is a tomato a fruit?, "
            "What is your favourite colour?, How are you today?, What can I do on a rainy day?, How long does "
            "pasta cook?, What is the largest ocean?, Why do cats purr?, What is the opposite of cold?, Do plants "
            "need light?, How old is the earth?, Why do we yawn?, What should I wear in the snow?, Can dogs eat "
            "grapes?, What is a good breakfast?, How do I say thank you in Italian?, What makes bread rise?, How "
            "many legs has a spider?, Why is exercise good?, Who painted the Mona Lisa?, What is the boiling "
            "point of water?, Is it safe to swim after eating?, What language do they speak in Brazil?"
        ),
    ),
    "business": (
        [
            "Write a short review of {}.",
            "I am not sure about {}. What do you think?",
            "Write a complaint about {}.",
            "Praise {} in two sentences.",
            "Sum up the pros and cons of {}.",
            "What did customers say about {}?",
        ],
        _words(
            "a noisy hotel, a new smartphone, an electric car, an online course, a cheap airline, a pair of "
            "running shoes, a gym near the station, a coffee machine, working from home, a four-day week, a "
            "dating app, a robot vacuum cleaner, an open-plan office, a local bakery, a streaming service, a "
            "second-hand bicycle, a bank with bad service, public transport, a winter coat, a video game about "
            "farming, an e-book reader, school uniforms, a mattress, social media, a theme park, a museum of "
            "modern art, a language app, daylight saving time, wooden toys, a garden hose, noise-cancelling "
            "headphones"
        ),
    ),
}


def _split() -> tuple[list[str], list[str]]:
    """Return the training pool, and all prompts on held-out subjects, each in a fixed shuffled order."""
    rng = random.Random(SEED)
    train, held_out = [], []
    for templates, subjects in DOMAINS.values():
        shuffled = rng.sample(subjects, len(subjects))
        for i, subject in enumerate(shuffled):
            (held_out if i < HELD_OUT_SUBJECTS else train).extend(t.format(subject) for t in templates)
    rng.shuffle(train)
    rng.shuffle(held_out)
    return train, held_out


def training_prompts(hh_file: Path | None = None) -> list[str]:
    """Return the shuffled training pool. With `hh_file`, the opening turns of its training lines are mixed in."""
    pool = _split()[0]
    if hh_file is None:
        return pool
    pool = list(dict.fromkeys(pool + hh_openings(hh_file)))
    random.Random(SEED).shuffle(pool)
    return pool


def held_out_prompts() -> list[str]:
    """Return the evaluation prompts. The training pool has none of them, and none of their subjects in their domain."""
    return _split()[1][:HELD_OUT]


def hh_openings(path: Path, max_chars: int = 300) -> list[str]:
    """Return the first human turns in the training lines (number % 5 != 0) of an HH-RLHF file (.jsonl or .jsonl.gz)."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["chosen"] for number, line in enumerate(lines) if number % 5]
    openings = (text.split("\n\nAssistant:")[0].removeprefix("\n\nHuman:").strip() for text in texts)
    return [opening for opening in openings if 0 < len(opening) <= max_chars]
