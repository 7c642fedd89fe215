"""User turns for the text that a target writes itself: templates times topics, written for this project."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

_SLOT = re.compile(r"\{(\w+)\}")

# alternatives for each slot, separated by semicolons
_SLOTS = {
    "place": """
        Lisbon; a fishing village in Norway; Kyoto; the Scottish Highlands; a night market in Taipei; the
        Atacama desert; Marrakesh; a mountain hut in the Alps; Buenos Aires; the Danube delta; an old library; a
        small island in Greece; Istanbul; the Canadian prairie; Cape Town; Prague
    """,
    "person": """
        a retired sailor; a young chemist; a nervous pianist; two sisters; a night-shift nurse; a beekeeper; an
        apprentice baker; a lighthouse keeper; a robot gardener; a lost tourist; a bookbinder; a detective; a
        taxi driver; an astronaut; a farmer; a clockmaker; a kind dragon; a shy ghost
    """,
    "theme": """
        friendship; the sea; losing and finding something; a promise; the first snow; growing old; courage;
        forgiveness; a broken machine; home; silence; hope; a long journey; rain in the city; memory
    """,
    "product": """
        a folding bicycle; noise-cancelling earplugs; a solar lamp; handmade soap; a language app; a smart
        watering can; a standing desk; organic dog food; a board game about trains; a camping stove; an online
        pottery course; a budgeting app; a wool blanket; a coffee subscription
    """,
    "job": """
        a primary school teacher; a travel agent; a career adviser; a fitness coach; a doctor; a chef; a museum
        guide; a lawyer; a software engineer; a gardener; a psychologist; a physicist; a financial adviser; a
        librarian; a historian; an architect; a sommelier; a veterinarian
    """,
    "figure": """
        Leonardo da Vinci; Ada Lovelace; Socrates; Cleopatra; Isaac Newton; Charles Darwin; Jane Austen; Nikola
        Tesla; Galileo Galilei; Abraham Lincoln; Mozart; Confucius; Florence Nightingale; a Viking explorer; a
        medieval knight; a pirate captain; an alien visiting the Earth; Robin Hood
    """,
    "problem": """
        I cannot sleep before exams; my neighbour plays loud music; my team misses every deadline; I want to
        learn the guitar but have little time; my houseplants keep dying; I am new in the city and lonely; my
        laptop is very slow; I spend too much money on food; I am afraid of speaking in public; my child refuses
        to eat vegetables; I have to choose between two job offers; I forget people's names
    """,
    "science": """
        black holes; photosynthesis; plate tectonics; the immune system; entropy; DNA replication;
        superconductors; the greenhouse effect; acids and bases; natural selection; electric motors; the water
        cycle; nuclear fusion; vaccination; sound waves; the Doppler effect; chemical bonds; the nervous system;
        lasers; tides; semiconductors; antibiotic resistance; gravity; volcanoes; quantum entanglement; machine
        learning; the periodic table; enzymes; radioactivity; ecosystems
    """,
    "idea": """
        the French Revolution; inflation; democracy; the Silk Road; stoicism; supply and demand; the
        Renaissance; colonialism; utilitarianism; the Cold War; the printing press; feminism; the Roman
        Republic; existentialism; globalisation; the industrial revolution; human rights; the Great Depression;
        impressionism; jazz; Buddhism; the Black Death; federalism; Shakespeare; the separation of powers;
        universal basic income; the Ottoman Empire; civil disobedience
    """,
    "code": """
        reverses a linked list; finds the two largest numbers in a list; counts the words in a text file; checks
        whether two strings are anagrams; computes the greatest common divisor; merges two sorted lists; removes
        duplicates from a list and keeps the order; parses a date such as 2024-03-17; finds the shortest path in
        a grid; validates an e-mail address; implements a stack with push and pop; converts Roman numerals to
        integers; prints the first n prime numbers; sorts a dictionary by value; finds the longest common prefix
        of some strings; implements binary search; rotates a matrix by 90 degrees; flattens a nested list;
        computes the moving average of a list; reads a CSV file and sums a column; solves the knapsack problem;
        detects a cycle in a graph; transposes a matrix; generates a password
    """,
    "tongue": """
        French; German; Spanish; Italian; Portuguese; Dutch
    """,
    "sentence": """
        The library closes at six on Fridays.; My brother works in a small bakery near the station.; We should
        leave before it starts to rain.; She has never seen the ocean.; Where can I buy a ticket?; The meeting
        has been moved to next Tuesday.; I would like a table for two, please.; He forgot his umbrella on the
        bus again.; The old bridge was built more than a century ago.; Could you tell me how to get to the
        museum?; They are planning to open a new school in the village.; The weather was so good that we ate
        outside.; Nobody knows who wrote this letter.
    """,
    "name": """
        Anna; Tom; Maria; Ben; Lena; Omar; Sofia; Jack; Priya; David; Emma; Carlos
    """,
    "thing": """
        apples; marbles; books; stamps; pencils; cookies; coins; cards; eggs; tickets; stickers
    """,
    "k": """
        three; four; five; six; ten
    """,
    "adjective": """
        short; funny; sad; suspenseful; formal; vivid; simple; persuasive; gentle; poetic
    """,
    "form": """
        story; poem; letter; dialogue; speech; diary entry; fairy tale; monologue; scene
    """,
    "everyday": """
        a healthy breakfast; learning to cook; saving energy at home; running a first 10 km race; growing
        tomatoes on a balcony; preparing for a job interview; training a puppy; packing for a long trip;
        removing a coffee stain; writing a good CV; starting a vegetable garden; making new friends; reading
        more books; a birthday party for children; fixing a dripping tap; choosing a used car
    """,
    "animal": """
        dolphins; owls; ants; elephants; octopuses; bats; wolves; bees; penguins; cats
    """,
    "pair": """
        a virus and a bacterium; a hurricane and a tornado; a crocodile and an alligator; stocks and bonds;
        speed and velocity; a list and a tuple in Python; empathy and sympathy; TCP and UDP; a comet and an
        asteroid; mitosis and meiosis; renewable and fossil energy; tea and coffee; city life and country life;
        a compiler and an interpreter; a simile and a metaphor; cats and dogs
    """,
}

SLOTS: dict[str, tuple[str, ...]] = {
    **{name: tuple(" ".join(options.split()).split("; ")) for name, options in _SLOTS.items()},
    "language": ("Python", "Python", "Python", "JavaScript", "C++", "Java", "Go", "SQL", "Rust", "Bash", "C"),
    "n": tuple(map(str, range(2, 60))),
    "m": tuple(map(str, range(2, 13))),
    "big": tuple(map(str, range(60, 980, 20))),
}

TEMPLATES: dict[str, tuple[str, ...]] = {
    "writing": (
        "Write a {adjective} {form} about {person} and {theme}.",
        "Write a {adjective} {form} set in {place}.",
        "Write an advertisement for {product}. Keep it under 100 words.",
        "Write a product description of {product} for an online shop.",
        "Draft a polite e-mail to {job} that asks for an appointment next week.",
        "Write an e-mail to my colleague {name} to say thank you for helping with {everyday}.",
        "Write an article with headings about {everyday}.",
        "Describe {place} at sunrise in one paragraph.",
        "Write the opening paragraph of a novel in which {person} arrives in {place}.",
        "Compose a {adjective} poem of {k} stanzas about {theme}.",
        "Write a review of {product}, with its good and bad sides.",
        "Write a blog post about {everyday} for beginners.",
        "Come up with {k} titles for a book about {person} in {place}.",
        "Write a persuasive essay for or against {idea}.",
    ),
    "roleplay": (
        "Pretend to be {figure} and tell me about a day in your life.",
        "You are {job}. {problem}. What would you advise?",
        "Act as {job} and answer my question: how should I go about {everyday}?",
        "Imagine that you are {figure}. Explain {science} in your own voice.",
        "Take the role of {job} and introduce yourself to a new client.",
        "Play {figure} in an interview. First question: what do you think of {idea}?",
        "Stay in the role of {figure} for the whole conversation. How do you feel today?",
        "You are {job} who only speaks in rhymes. Tell me about {everyday}.",
    ),
    "advice": (
        "{problem}. What can I do?",
        "Give me {k} tips for {everyday}.",
        "How do I start with {everyday}? Give me a plan step by step.",
        "What are the advantages and disadvantages of {product}?",
        "Make a checklist for {everyday}.",
        "Plan a weekend in {place} for a family with small children.",
        "What should I know before I visit {place}?",
        "Give me a recipe with {thing} and explain each step.",
    ),
    "reasoning": (
        "{name} is older than {name2}, and {name2} is older than {name3}. Who is the youngest, and why?",
        "If all {animal} in a zoo are asleep and {name} sees one that is awake, what follows?",
        "{name} sits to the left of {name2}. {name3} sits to the right of {name2}. Who sits in the middle? Explain.",
        "Which one does not belong: {animal}, {animal2}, {thing}? Give your reasons.",
        "Is the following argument valid? All {animal} sleep. {name} sleeps. So {name} is one of the {animal}.",
        "What would happen to {place} if there were no {science}? Think step by step.",
        "Give arguments for both sides: should schools teach {idea}?",
        "{name} enters a race and overtakes the person in place {m}. Which place is {name} in now?",
    ),
    "math": (
        "{name} has {n} {thing} and gives {m} of them to {name2}. How many are left?",
        "{name} buys {m} boxes with {n} {thing} each. How many {thing} is that in total?",
        "A train covers {big} km in {m} hours. What is its average speed?",
        "What is {n}% of {big}?",
        "Solve for x: {m}x + {n} = {big}.",
        "The sides of a rectangle are {n} cm and {m} cm. Find its area and its perimeter.",
        "What is the probability of drawing a red ball from a bag with {n} red and {m} blue balls?",
        "A shirt costs {big} dollars and is reduced by {n} percent. What is the new price?",
        "Find the mean of {n}, {big}, {m} and {n2}.",
        "If f(x) = {m}x^2 - {n}x + {n2}, what is f({m2})?",
        "How many different ways are there to arrange {m} {thing} in a row? Explain the formula.",
    ),
    "coding": (
        "Write a {language} function that {code}.",
        "Write a {language} program that {code}, and explain how it works.",
        "How would you write code that {code} in {language}? Discuss its time complexity.",
        "Write unit tests for a {language} function that {code}.",
        "Explain the difference between {pair}.",
        "What are common mistakes of beginners in {language}?",
        "Design a small web page about {product} with HTML and CSS.",
        "Implement a class for {thing} in {language} with a method that {code}.",
    ),
    "extraction": (
        "Read this text and list the people and places in it.\n\n{passage}",
        "Summarise the following passage in two sentences.\n\n{passage}",
        "What is the main point of this text?\n\n{passage}",
        "Turn the following text into a JSON object with the keys name, place, number and topic.\n\n{passage}",
        "Answer only from the text below: what did {name} do?\n\n{passage}",
        "Rewrite the following text for a ten-year-old.\n\n{passage}",
        "Rewrite the text in a more formal tone: {passage}",
        "Is this review positive or negative? Give a score from 1 to 5.\n\nI bought {product} last month. {opinion}",
        "Correct the grammar of this text: {name} go to {place} since two year and like it very much.",
    ),
    "stem": (
        "Explain {science} in simple terms.",
        "How does the theory of {science} help us to understand the world? Give an example.",
        "What is the connection between {science} and {science2}?",
        "Explain {science} to a child, and then to a university student.",
        "Describe an experiment that shows how {science} works.",
        "What are open questions in the study of {science}?",
        "List {k} facts about {animal} and explain one of them in detail.",
        "What is the difference between {pair}? Give examples.",
        "Who discovered the principles of {science}, and how?",
    ),
    "humanities": (
        "What were the causes and consequences of {idea}?",
        "Explain {idea} and give two examples from history.",
        "Compare {idea} with {idea2}.",
        "How did {idea} change everyday life?",
        "Write a lesson plan of 45 minutes about {idea} for pupils of 14 years.",
        "Who was {figure}, and why is this person remembered?",
        "Discuss the influence of {idea} on literature and art.",
        "What would {figure} think about {idea}?",
        "What can we learn today from {idea}? Give {k} points.",
    ),
    "translation": (
        "Translate into {tongue}: {sentence}",
        "How do you say in {tongue}: {sentence}",
        "Translate the following sentence into {tongue} and explain its grammar: {sentence}",
        "Teach me {k} useful {tongue} phrases for a trip to {place}.",
        "Rephrase this sentence in three ways: {sentence}",
    ),
}

_OPENINGS: tuple[str, ...] = (
    "{name} moved to {place} in {year} and opened a shop for {product}.",
    "In {year}, {n} people from {place} met {name} to talk about {idea}.",
    "{name}, {job}, spent {m} years in {place} studying {animal}.",
    "A new museum about {science} was opened in {place} by {name} on {n2} May {year}.",
    "The company of {name} and {name2} sells {product} to {big} shops, most of them in {place}.",
)
_MIDDLES: tuple[str, ...] = (
    "At first nobody believed that it could work.",
    "The first {m} months were hard, and {name2} thought about giving up.",
    "According to a survey, {n} percent of the visitors came because of {theme}.",
    "It cost about {big} thousand euros, twice as much as planned.",
    "Experts in {science} had warned that {animal} might disappear from the region.",
    "Most of the money came from {name3}, who had once been {person}.",
)
_ENDINGS: tuple[str, ...] = (
    "Today more than {big} people visit every year.",
    '"We would do it again," says {name}, "but with more {thing}."',
    "Whether this will last depends on how the town deals with {idea}.",
    "The next step is planned for the spring in {place2}.",
    "In the end it was {everyday} that made the difference.",
)
_OPINIONS: tuple[str, ...] = (
    "It broke after a week, and nobody answered my letters.",
    "It is the best thing I have bought in years, and my friends want one too.",
    "It does what it should, but it was too expensive.",
    "The colour is lovely, the instructions are useless, and I still like it.",
)


def _choice(rng: random.Random, options: tuple[str, ...]) -> str:
    return options[rng.randrange(len(options))]


def _fill(rng: random.Random, template: str) -> str:
    """Replace every slot; a digit at its end asks for another value of the same list."""
    chosen: dict[str, str] = {}

    def value(match: re.Match[str]) -> str:
        slot = match[1]
        if slot not in chosen:
            kind = slot.rstrip("0123456789")
            special: dict[str, Callable[[], str]] = {
                "passage": lambda: _passage(rng),
                "opinion": lambda: _choice(rng, _OPINIONS),
                "year": lambda: str(rng.randrange(1890, 2024)),
            }
            for _ in range(8):
                chosen[slot] = special[kind]() if kind in special else _choice(rng, SLOTS[kind])
                if list(chosen.values()).count(chosen[slot]) == 1:
                    break
        return chosen[slot]

    text = _SLOT.sub(value, template)
    return text[0].upper() + text[1:]


def _passage(rng: random.Random) -> str:
    middles = rng.sample(_MIDDLES, rng.randrange(1, 4))
    text = " ".join([_choice(rng, _OPENINGS), *middles, _choice(rng, _ENDINGS)])
    return ". ".join(part for part in _fill(rng, text).split(". "))


def user_turn(seed: int) -> str:
    """One user turn; the same seed gives the same text.

    Args:
        seed: any whole number.

    Returns:
        A request of a category drawn uniformly, from a template of it with its slots filled.
    """
    rng = random.Random(seed)
    templates = TEMPLATES[_choice(rng, tuple(TEMPLATES))]
    return _fill(rng, _choice(rng, templates))
