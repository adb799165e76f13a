"""Prompts of many kinds, to have a target write texts that a draft is trained on.

A draft that has seen few templates looks better on held-out texts of the same templates than it is. So instructions are
composed of many openings over many texts: Python's language reference and docstrings, and any texts that are given.
"""

import random
from collections.abc import Iterator, Sequence

from specjax.experiments import stdlib_texts

_OVER_TEXT = (
    "Summarise this text in one sentence.\n\n{text}",
    "Summarize: {text}",
    "{text}\n\nTL;DR",
    "Explain this to a child.\n\n{text}",
    "What does this mean? {text}",
    "List the main points of the following passage.\n\n{text}",
    "Rewrite this text so that it is friendlier.\n\n{text}",
    "Paraphrase the following paragraph.\n{text}",
    "Correct the mistakes in this text, and print the whole text again.\n\n{text}",
    "Translate to German: {text}",
    "Translate the following sentence into French.\n{text}",
    "Write three questions about this passage, with their answers.\n\n{text}",
    "Continue this text.\n\n{text}",
    "Which words of this text are names of things? Give a list.\n\n{text}",
    "Write a headline for this text.\n\n{text}",
    "Here is a document:\n\n{text}\n\nWhat is it about, and who would read it?",
    "Turn this into bullet points:\n{text}",
    "Extract the facts of this text as JSON.\n\n{text}",
)
_OVER_HEAD = (
    "Write a Python function for this description: {head}",
    "Write a program that does the following. {head} Explain your code.",
    "How would I implement this in Java? {head}",
    "Write unit tests for a function whose documentation says: {head}",
    "I read this in some documentation and do not understand it: {head}",
    "Give an example in code of the following: {head}",
)
_OPEN = (
    "What is {topic}?",
    "Explain {topic} in simple terms.",
    "Write a short story about {topic}.",
    "Write a poem about {topic}.",
    "Give me five tips about {topic}.",
    "What are the advantages and disadvantages of {topic}?",
    "Write an email to a colleague about {topic}.",
    "You are an expert on {topic}. Introduce yourself.",
    "Tell me about the history of {topic}.",
    "Compare {topic} with {other}.",
    "Who was important for {topic}, and why?",
    "Write a dialogue between two friends about {topic} and {other}.",
    "Write an essay of three paragraphs about {topic}.",
    "How does {topic} affect {other}?",
    "Describe {topic} to somebody who has never heard of it.",
    "Write a product description that mentions {topic}.",
    "Make a plan for a week of learning about {topic}.",
    "What questions should I ask about {topic}?",
    "Is {topic} more important than {other}? Argue for both sides.",
    "hi! can you help me with {topic}?",
)
# fmt: off
_TOPICS = (
    "photosynthesis", "the French Revolution", "baking bread", "black holes", "electric cars", "the stock market",
    "yoga", "jazz music", "chess", "climate change", "ancient Rome", "vaccines", "football", "gardening",
    "machine learning", "poetry", "coral reefs", "the human heart", "wine", "online shopping", "public transport",
    "dinosaurs", "democracy", "the moon landing", "mountain climbing", "coffee", "sleep", "dreams", "robots",
    "the Second World War", "painting", "family dinners", "job interviews", "time management", "databases",
    "cooking pasta", "volcanoes", "Shakespeare", "quantum mechanics", "evolution", "inflation", "marketing",
    "friendship", "honey bees", "the internet", "bicycles", "whales", "solar power", "the Great Wall of China",
    "learning a language", "meditation", "tea", "cats", "dogs", "nuclear energy", "space travel", "the Middle Ages",
    "architecture", "statistics", "recycling", "small businesses", "the brain", "antibiotics", "rivers", "trade",
    "philosophy", "loneliness", "museums", "teaching mathematics", "earthquakes", "the Olympic Games", "video games",
    "nutrition", "running", "cryptography", "the printing press", "libraries", "penguins", "forests", "cheese",
    "taxes", "migration", "music theory", "the periodic table", "gravity", "hospitals", "writing novels",
    "a lost key", "a small village", "an old lighthouse", "a trip to Japan", "Hawaii", "Paris", "Africa", "India",
    "sorting algorithms", "linked lists", "regular expressions", "web servers", "unit tests", "operating systems",
    "probability",
)
# fmt: on
_MATHS = (
    "What is {a} + {b} * {c}?",
    "A shop sells {a} apples a day at {c} dollars each. How much does it earn in {b} days?",
    "Tom has {a} marbles and gives {c} to each of his {d} friends. How many are left?",
    "A train travels {b} kilometres in {d} hours. What is its average speed?",
    "Solve for x: {c}x + {a} = {b}.",
    "The sides of a rectangle are {a} and {b}. What are its area and its perimeter?",
    "{name} reads {a} pages on Monday and twice as many on Tuesday. The book has {b}00 pages. How many are left?",
    "If {d} workers need {a} hours for a job, how long do {c} workers need? Think step by step.",
    "What is {a}% of {b}00?",
)
_NAMES = ("Anna", "Omar", "Mei", "Lucas", "Priya", "Sofia", "James", "Nadia")


def _maths(draw: random.Random) -> str:
    numbers = {"a": draw.randint(3, 99), "b": draw.randint(3, 99), "c": draw.randint(2, 12), "d": draw.randint(2, 9)}
    return draw.choice(_MATHS).format(name=draw.choice(_NAMES), **numbers)


def instructions(number: int, texts: Sequence[str] = (), seed: int = 0) -> Iterator[stdlib_texts.Line]:
    """Prompts over texts, descriptions of code, topics and numbers, in random order.

    Args:
      number: how many.
      texts: passages to use besides those of Python's documentation.
      seed: of the choice.
    """
    draw = random.Random(seed)
    passages = [text for text in stdlib_texts.passages() if len(text) <= 600]
    heads = [pair["target"] for pair in stdlib_texts.pairs()["train"]]

    def over_text() -> str:
        source = texts if texts and draw.random() < 0.75 else passages
        return draw.choice(_OVER_TEXT).format(text=draw.choice(source))

    def open_question() -> str:
        topic, other = draw.sample(_TOPICS, 2)
        return draw.choice(_OPEN).format(topic=topic, other=other)

    makers = {
        "text": over_text,
        "code": lambda: draw.choice(_OVER_HEAD).format(head=draw.choice(heads)),
        "open": open_question,
        "maths": lambda: _maths(draw),
    }
    for i in range(number):
        (category,) = draw.choices(list(makers), weights=(4, 2, 3, 1))
        yield {"category": category, "id": i, "prompt": makers[category]()}
