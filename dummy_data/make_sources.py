#!/usr/bin/env python3
"""Write sharegpt.json, openorca.parquet, dolly.jsonl and oasst1.jsonl beside this script.

Every prompt is our own. The files have the formats of the data sets they stand for, and rows for every
rule of step 1; only prompts are read by it, so the responses are placeholders. The bytes are the same in
every run with one version of pyarrow, which openorca.parquet needs. usage: make_sources.py
"""

import hashlib
import json
import pathlib

import pyarrow
import pyarrow.parquet

HERE = pathlib.Path(__file__).parent
REPLIES = [
    "Gladly. The short version comes first, the details follow.",
    "Here is one way to look at it.",
    "Sure. I will keep it brief.",
    "Let me take this step by step.",
    "A few words should be enough here.",
]

GARDEN = (
    "Last spring our street decided to turn the empty lot behind the bakery into a shared garden. The soil was hard "
    "and full of broken brick, so the first month went into clearing it, bucket by bucket. Then came the question of "
    "water: the nearest tap stands across the road, and nobody wanted to carry cans in July. A retired plumber drew a "
    "plan for two rain barrels under the bakery's gutter, and the baker agreed on one condition, that the corner next "
    "to his door be kept for rosemary and thyme. By May there were nineteen small beds, each with a painted number. "
    "Some neighbours grew beans and peas, others tried melons, which the slugs ate within a week. There were quarrels "
    "about the compost heap, about dogs, and about a radio that played from morning to evening. In June a list of rules "
    "was nailed to the shed: water before nine, no radio after six, tools go back clean, and whoever takes the last bag "
    "of mulch brings the next one. The harvest was modest, forty kilos of potatoes, a crate of onions and more "
    "courgettes than anyone could eat, but the evening when everything was cooked in one large pot is still talked "
    "about. This year the waiting list has thirty names, and the town has offered a second lot near the station, which "
    "is larger, sunnier and, sadly, even stonier than the first one was."
)

# (stratum, question)
OPENORCA = [
    ("niv", "You are given a word. Write one sentence that uses the word correctly.\n\nWord: lantern"),
    ("niv", "In this task you get the name of an animal and have to say whether it lays eggs. Answer with yes or no.\n\nAnimal: penguin"),
    ("niv", "Given a list of numbers, write the list again from the smallest to the largest.\n\nList: 14, 3, 9, 27, 1"),
    ("niv", "Turn the statement into a question that asks for the underlined fact.\n\nStatement: The bridge was finished in _1932_."),
    ("niv", "Find the word in the list that does not belong to the others and name it.\n\nviolin, trumpet, ladder, flute"),
    ("niv", "Rewrite the sentence in the past tense.\n\nSentence: She walks to the market and buys two lemons."),
    ("niv", "Read the short review and say whether the guest was happy.\n\nReview: The room was quiet, the bed was soft and breakfast was served until noon."),
    ("niv", "Write a title of at most six words for the text.\n\nText: " + GARDEN),
    ("niv", "Decide how the second sentence relates to the first.\n\nPremise: A boy is flying a kite on the beach.\nHypothesis: A child is outdoors."),
    ("niv", "Count the vowels in the word and give the number alone.\n\nWord: orchestra"),
    ("niv", "  Name the capital of the country.\n\nCountry: Portugal  \n"),
    ("flan", "What is the difference between weather and climate? Explain it in two sentences."),
    ("flan", "Write a short text message that tells a friend you will be ten minutes late."),
    ("flan", "Question: Which gas do plants take in from the air to make sugar?\nAnswer:"),
    ("flan", "Translate to German: Where is the nearest train station?"),
    ("flan", "Is the following sentence correct English? If not, correct it.\n\nHim and me goes to school by bus."),
    ("flan", "Summarize in one sentence: The library closes early on Fridays because the staff meets, but from next month it will stay open until eight."),
    ("flan", "What is the difference between weather and climate? Explain it in two sentences."),
    ("flan", "WHAT IS THE DIFFERENCE between weather and climate?  Explain it in two sentences."),
    ("flan", "Context: Ana has a red bicycle and Leo has a blue one.\nQuestion: Who has the blue bicycle?"),
    ("flan", "Generate a sentence about a fox that includes the words river, moon and quiet."),
    ("flan", "Which of these is a fruit: carrot, pear, spinach? Give the reason."),
    ("flan", "Review: The film was long, loud and dull.\nIs this review positive or negative?"),
    ("flan", "A shop rents its premises by the month. What should a small business check before it signs such a contract?"),
    ("flan", "   \n\t "),
    ("flan", "Does the first sentence say that the second one is true? Choose yes, no, or it is not possible to tell.\n\nAll shops were closed. Nobody sold bread."),
    ("flan", "Continue the story with two sentences: The lighthouse keeper heard a knock, although no boat had landed for days."),
    ("t0", "I want to explain to a six-year-old why the moon changes its shape. What could I say?"),
    ("t0", "Choose the best word for the gap and write the whole sentence.\n\nThe soup is too hot, so let it ___ for a while. (cool, freeze, burn)"),
    ("t0", "Here is an email: 'The meeting moves from Tuesday to Thursday at three.' What is the new day of the meeting?"),
    ("t0", "Wie heißen die vier Jahreszeiten auf Englisch?"),
    ("t0", "Quels sont trois avantages de la marche à pied ? Réponds en une phrase."),
    ("t0", "Give three synonyms of the word 'brave'."),
    ("t0", "Someone says: 'I could eat a horse.' What does this person mean?"),
    ("t0", "Name the capital of the country.\n\nCountry: Portugal"),
    ("t0", "Is a whale a fish or a mammal? Answer and give one reason."),
    ("t0", "Put the steps in the right order: pour the tea, boil the water, wait three minutes, add the leaves."),
    ("t0", "Which sport does the following describe? Two players hit a small ball over a net with rackets."),
    ("t0", "The premise of a story is that a village wakes up without clocks. Suggest a first line."),
    ("cot", "Tom has 3 boxes with 12 pencils each. He gives 8 pencils away. How many pencils are left? Think step by step."),
    ("cot", "A train leaves at 9:40 and arrives at 11:05. How long is the journey? Explain your steps."),
    ("cot", "If all roses are flowers and some flowers fade quickly, must some roses fade quickly? Give your reasoning."),
    ("cot", "A shirt costs 20 dollars and is reduced by 15 percent. What is the new price? Show how you get there."),
    ("cot", "Why do we see lightning before we hear thunder? Reason from the speed of light and of sound."),
    ("cot", "I am facing north and turn right twice. In which direction do I look now? Explain."),
    ("cot", "A recipe for 4 people needs 300 grams of rice. How much rice is needed for 6 people? Show each step."),
    ("cot", "Anna is older than Ben, and Ben is older than Carl. Who is the youngest? Explain briefly."),
]

KOREAN_BUTTON = "지금 번역하기"

# First human turns; a second turn follows.
SHAREGPT = [
    "Explain what a variable is in programming, as if I had never seen code.",
    "1 / 1\n\nWrite a Python function that returns the largest number in a list.",
    "2 / 3\n\nGive me five ideas for a rainy Sunday at home.\n\nShare Prompt",
    "How do I write a polite email to ask my landlord to fix the heating?\n\n1 / 1",
    "Marta K\n\n1 / 1\n\nWhat is the difference between a list and a tuple in Python?",
    "Why is the sea salty? Keep it short.\n\nShare Prompt",
    "Make a packing list for a weekend of hiking in autumn.\n\nTranslate now",
    "What does 'break the ice' mean, and when would I say it?\n\nLanguage: English",
    "Schreib mir ein kurzes Gedicht über den ersten Schnee.\n\nLanguage: German\nShare Prompt",
    "Explain how vaccines work in three sentences.\n" + KOREAN_BUTTON + "\nExplain how vaccines work",
    "Plan a simple dinner for two with rice, eggs and spinach.\n \n Language: Korean\n\nmore text of the page",
    "~The following is a conversation with Bing, not ChatGPT.~ Which planets have rings?",
    "   What is photosynthesis? Explain it for a ten-year-old.\n\n",
    "24/7 support: write a friendly banner text for a small internet shop that answers day and night.",
    "Simplify 6/8",
    "What does the mark 1 / 1 under a picture in a gallery usually tell the buyer?",
    "How would a native speaker translate the button " + KOREAN_BUTTON + " into English?",
    "Give me a regular expression that matches a date such as 2021-07-30, and explain each part.",
    "I have an interview for a job in a bookshop tomorrow. Which three questions should I expect?",
    "Write a haiku about a cat that waits at a window.",
    "What is the difference between a virus and a bacterium?",
    "Write a SQL query that counts the orders of each customer in a table `orders`.",
    "Suggest a name for a bakery that sells only bread with seeds.",
    "Can you explain recursion with an example from daily life?",
    "Escribe tres consejos para aprender un idioma nuevo.",
    "用一句话解释什么是人工智能。",
    "Comment faire une bonne vinaigrette ?",
    "List the steps to change a flat tyre on a bicycle.",
    "Rewrite this so that it sounds more polite: Send me the file today.",
    "What is inflation? Give one example with bread.",
    "Create a weekly timetable for someone who learns the guitar thirty minutes a day.",
    "Is it better to study in the morning or in the evening? Look at both sides.",
    "Write a bash command that shows the ten largest files in a folder.",
    "Which classes of words are in the sentence 'The quick fox runs home'?",
    "What can I cook with potatoes, leeks and a little cream?",
    "Explain the rule of three in photography.",
    "Tell me a short story about a robot that is afraid of rain.",
    "Give me three reasons to learn to swim as an adult.",
    "What is the difference between 'affect' and 'effect'?",
    "How can a small office save paper? Make a list.",
    "Write a JavaScript function that reverses a string.",
    "Who are you, and what can you help me with?",
    "Compare tea and coffee in a small table.",
    "Is 97 a prime number? Show how you know.",
    "why is the sea salty?  KEEP IT SHORT.",
    "Give me three reasons to learn to swim as an adult.",
    "Share Prompt",
    "Hi",
    "Read this and tell me what the neighbours should do about the second lot:\n\n" + GARDEN,
    " \n ",
]

# (category, instruction, context)
DOLLY = [
    ("open_qa", "Why do leaves turn red and yellow in autumn?", ""),
    ("open_qa", "What is the largest ocean on Earth?", ""),
    ("open_qa", "How does a refrigerator keep food cold?", ""),
    ("open_qa", "What is a leap year and why do we need it?", ""),
    ("open_qa", "Who writes the laws in a parliament?", ""),
    ("open_qa", "What is the boiling point of water at sea level?", ""),
    ("open_qa", "What makes bread rise?", ""),
    ("open_qa", "Which organ of the body cleans the blood?", ""),
    ("open_qa", "What is the difference between a comet and an asteroid?", ""),
    ("open_qa", "How many minutes are there in a day?", ""),
    ("general_qa", "Why is sleep important?", ""),
    ("general_qa", "What are the advantages and disadvantages of working from home?", ""),
    ("general_qa", "How can I learn to type faster?", ""),
    ("general_qa", "What should a beginner know before buying a houseplant?", ""),
    ("general_qa", "Why do people keep diaries?", ""),
    ("general_qa", "What is a balanced diet?", ""),
    ("general_qa", "How do I know whether an avocado is ripe?", ""),
    ("general_qa", "What is the point of a warm-up before sport?", ""),
    ("brainstorming", "Give me ten ideas for a children's birthday game that needs no toys.", ""),
    ("brainstorming", "List ways to reuse an empty glass jar.", ""),
    ("brainstorming", "Think of five topics for a school newspaper.", ""),
    ("brainstorming", "What are some hobbies that cost almost nothing?", ""),
    ("brainstorming", "Name things that one should bring to a picnic.", ""),
    ("brainstorming", "Suggest five questions to get to know a new colleague.", ""),
    ("brainstorming", "List some animals that are active at night.", ""),
    ("brainstorming", "Give me some ideas for a short speech at my sister's wedding.", ""),
    ("classification", "Sort these into fruits and vegetables: apple, carrot, onion, plum, leek, cherry.", ""),
    ("classification", "Which of these are mammals? Dolphin, trout, bat, sparrow, horse.", ""),
    ("classification", "Say for each whether it is a solid, a liquid or a gas at room temperature: iron, oxygen, olive oil.", ""),
    ("classification", "Tell me which of these instruments have strings: harp, oboe, cello, drum.", ""),
    ("classification", "Split this list into hot and cold colours: blue, orange, green, red, violet, yellow.", ""),
    ("classification", "Is each of these a city or a country? Kenya, Lima, Oslo, Vietnam.", ""),
    ("creative_writing", "Write a short poem about a train that never arrives.", ""),
    ("creative_writing", "Write a letter from a snowman to the sun.", ""),
    ("creative_writing", "Invent a slogan for a shop that repairs umbrellas.", ""),
    ("creative_writing", "Describe a harbour at dawn in four sentences.", ""),
    ("creative_writing", "Tell the story of a lost glove in fewer than a hundred words.", ""),
    ("creative_writing", "Write a dialogue between a pencil and an eraser.", ""),
    ("creative_writing", "Continue this opening in your own way, and let the plumber speak: " + GARDEN, ""),
    ("summarization", "Sum up what happened in the garden in three points.", GARDEN),
    ("closed_qa", "How many beds did the garden have in May?", GARDEN),
    ("information_extraction", "List all vegetables that the text names.", GARDEN),
    ("open_qa", "What did the baker ask for in return?", GARDEN),
    ("general_qa", "why is  sleep important?", ""),
    ("general_qa", "How can I learn to type faster?", ""),
    ("open_qa", "What is the largest ocean on Earth?\n", ""),
]

# (language, prompt, number of replies)
OASST = [
    ("en", "Can you explain the water cycle to me?", 2),
    ("en", "Write a to-do list for moving to a new flat.", 1),
    ("en", "What is a healthy breakfast that takes five minutes?", 1),
    ("en", "I keep forgetting names. Is there a trick?", 2),
    ("en", "How do I center a div with CSS?", 1),
    ("en", "Please write a limerick about a goat on a roof.", 1),
    ("en", "What is the difference between RAM and a hard disk?", 1),
    ("en", "How can I tell a friend that I cannot come to the party?", 1),
    ("en", "Give me a workout of ten minutes without equipment.", 1),
    ("en", "Why do cats purr?", 2),
    ("en", "How does a bill become a law? Give the main steps.", 1),
    ("en", "Write a Python program that prints the numbers from 1 to 10.", 1),
    ("en", "What are the parts of an atom?", 1),
    ("en", "Can you recommend how to start with watercolour painting?", 1),
    ("en", "What is the meaning of the proverb 'still waters run deep'?", 1),
    ("en", "Which questions should I ask when I rent a room?", 1),
    ("en", "What is the purpose of an index in a database?", 1),
    ("en", "Help me plan a day in a museum with two small children.", 2),
    ("en", "What should I write in a thank-you card for a teacher?", 1),
    ("en", "Name five inventions that changed daily life and say how.", 1),
    ("en", "Is coffee bad for you? Give both sides.", 1),
    ("en", "How do bees make honey?", 1),
    ("en", "Explain the offside rule in football in simple words.", 1),
    ("en", "Write a short review of an imaginary restaurant on the moon.", 1),
    ("en", "What is the difference between a hobby and a job?", 1),
    ("en", "Which steps does a cash machine go through when I withdraw money?", 1),
    ("de", "Was ist der Unterschied zwischen einem See und einem Meer?", 1),
    ("de", "Nenne drei Tipps gegen Langeweile.", 1),
    ("fr", "Explique-moi simplement ce qu'est une éclipse.", 1),
    ("es", "¿Por qué el cielo es azul?", 1),
    ("es", "Dame una receta fácil con garbanzos.", 1),
    ("it", "Come si prepara un buon caffè con la moka?", 1),
    ("pt", "O que é um buraco negro?", 1),
    ("zh", "请列出三种常见的水果。", 1),
    ("ja", "日本の四季について短く説明してください。", 1),
    ("ru", "Почему важно пить воду?", 1),
    ("en", "Nobody has answered this yet: what is a fjord?", 0),
    ("en", "can you explain the  water cycle to me?", 1),
    ("en", "Why is sleep important?", 1),
    ("en", "  How long does it take for light from the sun to reach us?\n", 1),
    ("en", "What would you improve in the rules of this garden, and why?\n\n" + GARDEN, 1),
]


def reply(n):
    return REPLIES[n % len(REPLIES)]


def uuid(text):
    h = hashlib.sha256(text.encode()).hexdigest()
    return f"{h[:8]}-{h[8:12]}-{h[12:16]}-{h[16:20]}-{h[20:32]}"


def turn(who, text):
    return {"from": who, "value": text}


def sharegpt():
    rows = [[turn("human", text), turn("gpt", reply(n))] for n, text in enumerate(SHAREGPT)]
    rows[3] += [turn("human", "Thank you. Make it shorter."), turn("gpt", reply(4))]
    rows.append([turn("gpt", "Welcome back. What shall we do today?"), turn("human", "Let us go on.")])
    rows.append([turn("human", "This page was saved before the answer came. Why?")])
    rows.append([])
    rows = [{"id": f"dummy{n:03}_0", "conversations": turns} for n, turns in enumerate(rows)]
    (HERE / "sharegpt.json").write_text(json.dumps(rows, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def openorca():
    columns = {"id": [], "system_prompt": [], "question": [], "response": []}
    for n, (stratum, question) in enumerate(OPENORCA):
        columns["id"].append(f"{stratum}.{7001 + 13 * n}")
        columns["system_prompt"].append("" if n % 3 else "Answer as briefly as you can.")
        columns["question"].append(question)
        columns["response"].append(reply(n))
    # Two row groups, so that readers meet a border.
    pyarrow.parquet.write_table(pyarrow.table(columns), HERE / "openorca.parquet", row_group_size=32)


def write_lines(name, rows):
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (HERE / name).write_text("".join(lines), encoding="utf-8")


def dolly():
    write_lines("dolly.jsonl", [
        {"instruction": instruction, "context": context, "response": reply(n), "category": category}
        for n, (category, instruction, context) in enumerate(DOLLY)
    ])


def message(text, parent, tree, role, lang):
    return {
        "message_id": uuid(f"{role}{tree}{parent}{text}"), "parent_id": parent, "user_id": uuid(role),
        "created_date": "2024-01-01T00:00:00+00:00", "text": text, "role": role, "lang": lang,
        "review_count": 3, "review_result": True, "deleted": False, "rank": None, "synthetic": False,
        "model_name": None, "message_tree_id": tree, "tree_state": "ready_for_export",
    }


def oasst():
    rows = []
    for n, (lang, text, replies) in enumerate(OASST):
        root = message(text, None, uuid(f"tree{n}"), "prompter", lang)
        root["message_tree_id"] = root["message_id"]
        rows.append(root)
        for k in range(replies):
            answer = message(reply(n + k), root["message_id"], root["message_id"], "assistant", lang)
            rows.append(answer)
        if replies > 1:
            rows.append(message("Could you say that in other words?", answer["message_id"], root["message_id"], "prompter", lang))
    write_lines("oasst1.jsonl", rows)


sharegpt()
openorca()
dolly()
oasst()
