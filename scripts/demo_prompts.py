# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Prints the prompts on whose answers the demo's draft head was trained, as JSON lines.

    python scripts/demo_prompts.py --count 3000 --seed 0 > prompts.jsonl
    python scripts/demo_prompts.py --count 15000 --seed 1 --library > prompts.jsonl
    python scripts/demo_prompts.py --count 45000 --seed 2 --library --wide > prompts.jsonl

Tasks of the kinds that users give to an assistant, each with a subject put in: questions, writing,
editing, reasoning, sums, code to write and code to finish, some with a second turn. All were written
for this project; none is from a benchmark. With --library most of the functions to finish are those
of the standard library of the Python that runs this: their first line and docstring. With --wide
there are more subjects and longer tasks: sciences and humanities, roles, puzzles, sums with their
steps, texts to take apart, advice. The same options give the same file; with --library, of the same
Python.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import sys
import sysconfig
import textwrap
from pathlib import Path

TOPICS = """
tides; photosynthesis; the water cycle; volcanoes; black holes; inflation; supply and demand; compound interest;
the French Revolution; the Roman Empire; the Silk Road; the printing press; the Cold War; the Renaissance;
vaccines; sleep; the immune system; vitamins; blood pressure; meditation; first aid; stretching;
solar panels; wind power; electric cars; batteries; recycling; plastic waste; climate change; coral reefs;
machine learning; databases; encryption; web browsers; operating systems; version control; cloud computing; robots;
chess; jazz; opera; photography; pottery; knitting; gardening; beekeeping;
baking bread; coffee; tea; cheese; chocolate; rice; salads; soups;
marathon running; swimming; yoga; football; cycling; hiking; skiing; climbing;
job interviews; public speaking; time management; teamwork; remote work; saving money; renting a flat; buying a house;
dogs; cats; elephants; whales; bees; owls; sharks; penguins;
Japan; Brazil; Egypt; Iceland; Kenya; India; Canada; Italy;
the moon; Mars; comets; the Sun; satellites; telescopes; gravity; light;
poetry; novels; film music; theatre; museums; architecture; fashion; video games;
fractions; prime numbers; probability; geometry; statistics; algebra; graphs; logic;
honesty; friendship; courage; curiosity; patience; democracy; human rights; education
"""
MORE_TOPICS = """
quantum mechanics; the theory of relativity; electromagnetism; thermodynamics; chemical bonds; the periodic table; acids and bases;
catalysts; polymers; the cell membrane; mitosis; DNA replication; natural selection; genetics; proteins; enzymes; bacteria; viruses;
the nervous system; the heart; the kidneys; digestion; hormones; antibiotics; allergies; plate tectonics; earthquakes; glaciers;
the ozone layer; the carbon cycle; ecosystems; food chains; hurricanes; deserts; rainforests; ocean currents; fossils; dinosaurs;
neutron stars; the Big Bang; exoplanets; galaxies; the speed of light; lasers; semiconductors; magnets; sound waves; lenses; friction;
steam engines; bridges; concrete; satellites in orbit; nuclear power; hydrogen; superconductors; radar; 3D printing; microscopes;
sorting algorithms; hash tables; recursion; neural networks; compilers; the internet; public-key cryptography; computer memory;
derivatives; integrals; matrices; vectors; the Pythagorean theorem; logarithms; infinity; the normal distribution; Bayes' theorem;
the Enlightenment; the Industrial Revolution; feudalism; colonialism; the American Civil War; the First World War; the Ottoman Empire;
ancient Greece; ancient China; the Mongol Empire; the Aztecs; the Vikings; the Black Death; the Reformation; the moon landing;
capitalism; socialism; globalization; unemployment; interest rates; monopolies; taxes; trade agreements; central banks; stock markets;
the separation of powers; voting systems; constitutions; the United Nations; freedom of speech; privacy; copyright; juries;
utilitarianism; stoicism; existentialism; free will; justice; the self; logic and truth; beauty; happiness; virtue;
memory and learning; habits; motivation; dreams; emotions; prejudice; childhood development; stress; group behaviour; attention;
tragedy and comedy; metaphor; the epic poem; science fiction; fairy tales; autobiography; impressionism; cubism; baroque music; the symphony;
mythology; folk songs; dance; sculpture; documentary films; comics; calligraphy; gothic cathedrals; ballet; satire;
languages and dialects; the alphabet; grammar; translation; slang; sign language; body language; writing systems; etymology; rhetoric
"""
ROLES = """
a ship's captain; a detective; a time traveller; a talking tree; a medieval knight; a stand-up comedian; a travel guide; an old professor;
a robot that wants to be human; a sports commentator; a pirate; a royal cook; a ghost in a library; a chess grandmaster; an astronaut;
a news anchor; a football referee; a philosopher of ancient times; a strict editor; a friendly alien; a gardener; a private investigator;
a personal trainer; a museum guard; a wise owl; a math tutor; an interviewer; a career coach; a storyteller by a fire; a mayor
"""
PROBLEMS = """
I cannot fall asleep at night; my team misses its deadlines; I am nervous before exams; my neighbour is loud; I want to change my career;
I spend too much money; I feel lonely in a new city; my child does not like to read; I forget names; I argue with my brother;
my plants keep dying; I want to eat less sugar; my code is hard to read; nobody answers my emails; I want to learn a language;
I have to give a speech; my laptop is slow; I am always late; I want to start a small business; I have too many meetings;
my dog pulls on the lead; my back hurts from sitting; I cannot decide between two jobs; I want to write a novel; I get distracted by my phone
"""
PEOPLE = """
a teacher; a nurse; a farmer; a pilot; a chef; a lawyer; a carpenter; a student; a grandmother; a child of eight;
a scientist; a painter; a bus driver; a librarian; a programmer; a manager; a tourist; a new employee; a football coach;
a shop owner; a journalist; a retired engineer; a young parent; a doctor
"""
PLACES = """
a small village; a busy airport; an old lighthouse; a space station; a mountain hut; a night train; a quiet library;
a street market; a desert; a deep forest; a school kitchen; a fishing harbour; a castle; a city park; an empty theatre
"""
THINGS = """
a lamp; a bicycle; a water bottle; a backpack; a phone case; a wooden chair; a coffee machine; a pair of headphones;
a notebook; an umbrella; a garden tool; a board game; a travel app; a cookbook; a fitness watch; an online course
"""
SENTENCES = """
The meeting were moved to friday because nobody could came.
She don't like to swim, but she go to the beach every day.
Me and him has finished the report yesterday.
There is many reasons why people moves to the city.
He told me that he will call when he arrives, but he didn't.
The childrens was playing in the garden when it begin to rain.
I have visited Paris last year and it was very much beautiful.
Due to the fact that it was raining, we made the decision to stay at home.
The new policy has been implemented by the management in order to reduce costs.
In my personal opinion, I think that the plan is a good plan.
Our product is good and people like it and it is cheap.
The experiment failed, the sensor was broken.
I am writing to inform you that your parcel has been delayed.
The train was late so I missed the start of the film.
Although the food was cold, the waiter was friendly and the music was lovely.
This phone is the worst thing I have ever bought.
The hotel was clean, quiet and close to the station.
I waited two hours and nobody answered my question.
The lecture was long, but I learned a great deal.
We would be happy to welcome you again next summer.
"""
PASSAGES = """
The city council approved a plan on Monday to plant four thousand trees over the next three years. The trees will stand along main roads, where summers have become hotter. The mayor, Ana Ruiz, said that the project will cost six million euros and that schools will help to choose the species.
Honey bees live in colonies of up to sixty thousand. A single queen lays all the eggs, while workers clean the hive, feed the young and gather nectar. In winter the bees form a ball and shiver to keep the queen warm.
Tom Baker opened his bicycle shop in Leeds in 1998. At first he repaired old bikes; by 2010 he sold his own models and employed twelve people. Last year the shop sold 3,400 bicycles, most of them electric.
A battery stores energy in chemical form. When it is connected, ions move through the electrolyte and electrons move through the wire. Over many cycles the material ages, and the battery holds less charge than before.
Maria left the office at six, as always. At the corner she noticed a small door that she had never seen before. It was green, half open, and behind it somebody was playing the piano.
The study followed 2,100 adults for eight years. Those who walked at least thirty minutes a day had a lower risk of heart disease than those who did not. The authors warn that walking may be a sign of health rather than its cause.
On 14 March 2019 the ship Aurora left Oslo with 48 passengers. Two days later a storm broke its rudder. A Danish ferry towed it to Aalborg, where it was repaired within a week. Nobody was hurt.
Rice feeds more than half of the people on Earth. It grows best in warm, wet places, and most of it is eaten in the country where it is grown. China and India produce more than half of the world's rice.
The library is open from nine to seven on weekdays and from ten to four on Saturdays. Members may borrow up to eight books for three weeks. A late book costs twenty cents a day. Children under twelve need the signature of a parent.
Our team tested three kinds of paint. The first dried fast but cracked in the cold. The second cost twice as much and lasted for ten years. The third was easy to clean, and most customers preferred it.
The river Lenna rises in the hills near Tarn and flows for 210 kilometres to the sea. Its water drives four mills and one power station. In 1953 it flooded the town of Brel, and since then a dam has held it back.
Dear team, the printer on the second floor is broken again. Please use the one on the fourth floor until Thursday. If you need colour prints, ask Priya. I am sorry for the trouble. Best regards, Jonas
"""
LANGUAGES = "French; Spanish; German; Italian; Portuguese"
FORMATS = "a bulleted list; a numbered list; a short paragraph; three sentences; a table with two columns; one sentence"
TONES = "friendly; formal; funny; excited; calm; persuasive; simple; dramatic"

# name | arguments | what it does | call -> result | call -> result
FUNCTIONS = """
count_vowels | text: str | Return how many vowels the text has. | count_vowels("hello") -> 2 | count_vowels("xyz") -> 0
is_sorted | numbers: list | Return True if the numbers are in ascending order. | is_sorted([1, 2, 5]) -> True | is_sorted([3, 1]) -> False
second_largest | numbers: list | Return the second largest number of the list. | second_largest([4, 9, 7]) -> 7 | second_largest([1, 2]) -> 1
reverse_words | sentence: str | Return the sentence with its words in reverse order. | reverse_words("a b c") -> "c b a" | reverse_words("one") -> "one"
running_total | numbers: list | Return a list in which each number is the sum of all numbers up to it. | running_total([1, 2, 3]) -> [1, 3, 6] | running_total([]) -> []
remove_duplicates | items: list | Return the items without duplicates, in the order in which they first appear. | remove_duplicates([1, 2, 1]) -> [1, 2] | remove_duplicates([]) -> []
digit_sum | n: int | Return the sum of the digits of n. | digit_sum(123) -> 6 | digit_sum(9) -> 9
is_leap_year | year: int | Return True if the year is a leap year. | is_leap_year(2024) -> True | is_leap_year(1900) -> False
celsius_to_fahrenheit | celsius: float | Convert a temperature from Celsius to Fahrenheit. | celsius_to_fahrenheit(0) -> 32.0 | celsius_to_fahrenheit(100) -> 212.0
common_items | first: list, second: list | Return the sorted items that both lists have. | common_items([1, 2], [2, 3]) -> [2] | common_items([1], [2]) -> []
longest_word | sentence: str | Return the longest word of the sentence. | longest_word("a tall tree") -> "tall" | longest_word("hi") -> "hi"
is_anagram | a: str, b: str | Return True if the two words are anagrams. | is_anagram("listen", "silent") -> True | is_anagram("a", "b") -> False
flatten | nested: list | Return one flat list with the items of all inner lists. | flatten([[1], [2, 3]]) -> [1, 2, 3] | flatten([]) -> []
power_of_two | n: int | Return True if n is a power of two. | power_of_two(8) -> True | power_of_two(6) -> False
count_words | text: str | Return a dictionary with how often each word appears. | count_words("a b a") -> {"a": 2, "b": 1} | count_words("") -> {}
moving_average | values: list, size: int | Return the averages of all windows of the given size. | moving_average([1, 2, 3], 2) -> [1.5, 2.5] | moving_average([4], 1) -> [4.0]
merge_sorted | left: list, right: list | Merge two sorted lists into one sorted list. | merge_sorted([1, 4], [2]) -> [1, 2, 4] | merge_sorted([], [1]) -> [1]
transpose | matrix: list | Return the transpose of the matrix. | transpose([[1, 2], [3, 4]]) -> [[1, 3], [2, 4]] | transpose([[1]]) -> [[1]]
to_binary | n: int | Return the binary digits of n as a string. | to_binary(5) -> "101" | to_binary(0) -> "0"
caesar | text: str, shift: int | Shift every lower case letter by the given number of places. | caesar("abc", 1) -> "bcd" | caesar("xyz", 3) -> "abc"
find_index | items: list, wanted: int | Return the position of the wanted item, or -1. | find_index([5, 7], 7) -> 1 | find_index([], 1) -> -1
is_perfect | n: int | Return True if n equals the sum of its proper divisors. | is_perfect(6) -> True | is_perfect(8) -> False
collatz_steps | n: int | Return how many steps the Collatz sequence takes from n to 1. | collatz_steps(1) -> 0 | collatz_steps(6) -> 8
title_case | text: str | Return the text with the first letter of each word in upper case. | title_case("big red dog") -> "Big Red Dog" | title_case("") -> ""
rotate | items: list, k: int | Rotate the list to the right by k places. | rotate([1, 2, 3], 1) -> [3, 1, 2] | rotate([1], 5) -> [1]
median | numbers: list | Return the median of the numbers. | median([3, 1, 2]) -> 2 | median([1, 2, 3, 4]) -> 2.5
squares_of_even | numbers: list | Return the squares of the even numbers. | squares_of_even([1, 2, 4]) -> [4, 16] | squares_of_even([1]) -> []
balanced | text: str | Return True if every opening parenthesis is closed. | balanced("(())") -> True | balanced("(()") -> False
compress | text: str | Replace each run of a letter with the letter and its length. | compress("aaab") -> "a3b1" | compress("") -> ""
group_by_length | words: list | Return a dictionary from lengths to the words of that length. | group_by_length(["a", "bb"]) -> {1: ["a"], 2: ["bb"]} | group_by_length([]) -> {}
factorial | n: int | Return the factorial of n. | factorial(5) -> 120 | factorial(0) -> 1
nth_fibonacci | n: int | Return the n-th Fibonacci number, starting with 0 and 1. | nth_fibonacci(6) -> 8 | nth_fibonacci(0) -> 0
lcm | a: int, b: int | Return the least common multiple of a and b. | lcm(4, 6) -> 12 | lcm(3, 7) -> 21
prime_factors | n: int | Return the prime factors of n in ascending order. | prime_factors(12) -> [2, 2, 3] | prime_factors(7) -> [7]
parse_time | text: str | Turn a time like "2:30" into minutes. | parse_time("2:30") -> 150 | parse_time("0:05") -> 5
mask_card | number: str | Replace all but the last four characters with stars. | mask_card("12345678") -> "****5678" | mask_card("1234") -> "1234"
pair_sums | numbers: list, target: int | Return all pairs of numbers whose sum is the target. | pair_sums([1, 2, 3], 4) -> [(1, 3)] | pair_sums([], 1) -> []
chunk | items: list, size: int | Split the list into parts of the given size. | chunk([1, 2, 3], 2) -> [[1, 2], [3]] | chunk([], 2) -> []
clamp | value: float, low: float, high: float | Limit the value to the range from low to high. | clamp(5, 0, 3) -> 3 | clamp(-1, 0, 3) -> 0
sort_by_last | pairs: list | Sort the pairs by their last element. | sort_by_last([(1, 3), (2, 1)]) -> [(2, 1), (1, 3)] | sort_by_last([]) -> []
"""
CODE_IDEAS = """
sort a list of dictionaries by a key; read a CSV file and print the average of a column; find all duplicate files in a folder;
count the lines of a text file; check whether a string is a valid email address; compute the distance between two points;
implement a stack with push and pop; implement a queue with two stacks; implement a linked list; implement binary search;
implement bubble sort; implement quicksort; solve the Tower of Hanoi; generate all permutations of a string;
find the shortest path in a grid; check whether a graph has a cycle; parse a date like 2024-05-01; convert Roman numerals to integers;
make a simple calculator; make a guessing game; make a to-do list; simulate rolling two dice; draw a triangle of stars;
download a web page and count its links; cache the results of a slow function; retry a function that may fail;
merge two dictionaries; flatten a nested list; remove punctuation from a text; validate a password
"""


def _list(text: str, separator: str = ";") -> list[str]:
    return [item.strip() for item in text.replace("\n", " ").split(separator) if item.strip()]


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().splitlines()]


QUESTIONS = [
    "What is the main idea behind {topic}?",
    "Explain {topic} to {person}.",
    "Why does {topic} matter?",
    "How has {topic} changed over the last hundred years?",
    "What are the biggest myths about {topic}?",
    "Give me five interesting facts about {topic}.",
    "List three advantages and three disadvantages of {topic}.",
    "What should {person} know about {topic}?",
    "Compare {topic} with {topic2}.",
    "What do {topic} and {topic2} have in common?",
    "Describe {topic} in {format}.",
    "How would you begin to learn about {topic}? Answer in {format}.",
    "Summarize what is known about {topic} in {format}.",
    "Which questions about {topic} are still open?",
    "What is a common mistake that people make with {topic}, and how can they avoid it?",
    "Name some famous people who are connected with {topic}.",
    "What would happen if there were no {topic2} any more?",
    "Is {topic} more important than {topic2}? Give reasons.",
    "Define the word that best describes {topic} and use it in a sentence.",
    "Make a quiz of four questions about {topic}, with answers.",
]
WRITING = [
    "Write a short story about {person} in {place}.",
    "Write a poem about {topic}.",
    "Write a {tone} email from {person} to {person2} about {topic}.",
    "Write a {tone} product description for {thing}.",
    "Write a blog post of about 150 words on {topic}.",
    "Write a dialogue between {person} and {person2} about {topic}.",
    "Write a slogan for {thing}.",
    "Write the first paragraph of a mystery that takes place in {place}.",
    "Write a {tone} speech of one minute about {topic}.",
    "Write a review of {thing}.",
    "Write a letter of thanks to {person}.",
    "Write instructions for {person} who uses {thing} for the first time.",
    "Draft a {tone} message that invites friends to an evening about {topic}.",
    "Compose a haiku about {place}.",
    "Describe {place} with all five senses.",
    "Invent a character who is {person} and describe them.",
    "Think of ten names for {thing}.",
    "Plan a weekend in {country} for {person}.",
    "Create a daily schedule for {person} who wants to learn about {topic}.",
    "Give a recipe that {person} could cook in half an hour.",
    "Imagine you are {person}. What do you think about {topic}?",
    "You are {person} and I am {person2}. Explain to me what you do all day.",
    "Pretend to be {person} in {place} and answer: what did you see today?",
]
EDITING = [
    "Correct the grammar of this sentence: {sentence}",
    "Rewrite this in a {tone} tone: {sentence}",
    "Make this sentence shorter: {sentence}",
    "Translate into {language}: {sentence}",
    "Is this sentence positive, negative or neutral? {sentence}",
    "Which words of this sentence are verbs? {sentence}",
    "Write a question to which this is the answer: {sentence}",
    "Continue the story: {sentence}",
    "Summarize the following text in one sentence.\n\n{passage}",
    "Give the text a title.\n\n{passage}",
    "List all names, places and numbers in this text.\n\n{passage}",
    "Write three questions about this text, with answers.\n\n{passage}",
    "Rewrite the text for {person}.\n\n{passage}",
    "What are the key points of this text? Answer in {format}.\n\n{passage}",
    "Turn the text into a {tone} email.\n\n{passage}",
    "Extract the facts of the text as JSON.\n\n{passage}",
    "What happens next?\n\n{passage}",
]
SUMS = [
    "{name} has {a} apples and buys {b} more. Then {name} gives {c} to a friend. How many are left?",
    "A train travels {a} kilometres in {c} hours. What is its average speed?",
    "A shirt costs {a} dollars and is reduced by {c}0 percent. What is the new price?",
    "What is {a} times {b}? Show each step.",
    "Solve for x: {c}x + {b} = {a}",
    "A rectangle is {a} cm long and {b} cm wide. What are its area and its perimeter?",
    "{name} saves {b} euros a week. How many weeks does it take to save {a}0 euros?",
    "If {c} workers build a wall in {b} days, how long do {c2} workers need?",
    "What is the next number: {c}, {d}, {e}, {f}? Explain.",
    "Convert {a} kilometres to miles and {b} kilograms to pounds.",
    "{name} is {c} years older than {name2}. Together they are {a}. How old is each?",
    "All {plural} are animals. Some animals can fly. Does it follow that some {plural} can fly?",
    "{name} is taller than {name2}, and {name2} is taller than {name3}. Who is the shortest?",
    "How many ways are there to put {c} books on a shelf?",
    "A bag has {c} red balls and {b} blue ones. How probable is it to draw a red one?",
]
CODE = [
    "Write a Python function to {idea}.",
    "Write a program in {coding} to {idea}.",
    "How would you {idea} in Python? Explain your code.",
    "Show me how to {idea}, with comments.",
    "Write code to {idea} and a test for it.",
    "What is the time complexity of a program to {idea}?",
]
FINISH = [
    "Finish the function below.\n\n{code}",
    "Implement this Python function:\n{code}",
    "Complete this code.\n```python\n{code}```",
    "{code}\nWrite the body of this function.",
    "Fill in the missing code.\n{code}",
    "Here is a function without a body. Complete it.\n\n{code}",
]
WIDE: dict[str, list[str]] = {
    "knowledge": [
        "Explain how {topic} works, step by step, and give an example from everyday life.",
        "What is the difference between {topic} and {topic2}? Which of them came first?",
        "Describe the role of {topic} in the history of science, with at least two examples.",
        "In what ways has {topic} influenced {topic2}?",
        "I am studying {topic}. What are the three most important ideas, and how do they fit together?",
        "Give a short overview of {topic}: causes, course and consequences.",
        "What evidence do we have for what we believe about {topic}?",
        "Explain {topic} in two ways: first to {person}, then to an expert.",
        "What are the main theories about {topic}, and what does each fail to explain?",
        "How do scientists study {topic}? Describe one experiment in detail.",
        "Imagine a lesson of 45 minutes about {topic}. What happens in it, minute by minute?",
        "Write four multiple-choice questions about {topic} and mark the right answers.",
        "Which economic and social effects does {topic} have? Answer in {format}.",
        "Some people think that {topic} is overrated. Argue for both sides and then judge.",
        "How are {topic}, {topic2} and money connected?",
        "What would {person} ask about {topic}, and what would you answer?",
        "Suggest a method to measure the effect of {topic2} on {topic}.",
        "Why is {topic} hard to understand? Use an analogy to make it easy.",
        "Tell me about {topic}.",
        "What is {topic}?",
        "Who discovered or invented {topic}, and when?",
    ],
    "roles": [
        "Pretend that you are {role}. Answer my first question: what do you think about {topic}?",
        "Act as {role} and describe a day in {place}.",
        "You are {role}. Convince me to buy {thing}.",
        "From now on you are {role}, and you never leave your role. I ask: {problem}. What should I do?",
        "Speak like {role} and explain {topic}.",
        "Write a conversation in which {role} teaches {person} about {topic}.",
        "As {role}, write a diary entry about your first visit to {place}.",
        "Imagine that {role} and {role2} meet in {place}. What do they say to each other?",
        "Introduce yourself as {role} and tell us about your greatest success.",
    ],
    "puzzles": [
        "{name}, {name2} and {name3} stand in a line. {name} is behind {name2} and in front of {name3}. Who is first? Explain.",
        "{name} is {c} years old. In {c2} years {name} will be twice as old as {name2} is now. How old is {name2}?",
        "A clock strikes {c} times in {c2} seconds. How long does it take to strike twelve?",
        "Three boxes are labelled {thing}, {topic} and both. All labels are wrong. Which box do you open?",
        "A box holds {b} red, {c} blue and {c2} green pens. How many must you take to be sure of two of one colour?",
        "If all {plural} are quick and nothing quick is lazy, can a lazy {thing} be one of the {plural}? Think step by step.",
        "A farmer takes a wolf, a goat and a cabbage across a river. The boat holds {c} things. How?",
        "It takes {c} minutes to boil {c} eggs in one pot. How long does it take to boil {c2} eggs?",
        "{name} faces north, turns right twice and then left. Where does {name} look now?",
        "Yesterday was two days before Friday. Which day is tomorrow? Explain each step.",
        "Two doors lead out of {place}. One guard always lies and one tells the truth. What do you ask?",
        "{name} says that {name2} lies, and {name2} says that both lie. Who tells the truth?",
    ],
    "sums": [
        "A circle has a radius of {c} cm. How much larger is the area of one of {c2} cm?",
        "A baker makes {a} rolls a day and sells {b} percent of them before noon. How many are left?",
        "Where does the line y = {c}x + {b} cross the line y = {c2}x? Calculate step by step.",
        "Write {a} as a product of primes.",
        "A map has a scale of 1 to {a}00. How long is a road of {b} cm on the map?",
        "A coin is tossed {c} times. How probable is it that it never shows heads?",
        "Is {a} a multiple of {c}? How can one see it from the digits?",
        "{name} invests {a}0 dollars at {c} percent a year. How much is it after three years, with compound interest?",
        "Solve the system: x + y = {b}, x - y = {c}.",
        "A tank of {a} litres is filled at {b} litres a minute and leaks {c} litres a minute. When is it full?",
        "How many integers between {b} and {a} can be divided by {c}?",
        "The sides of a box are {c}, {c2} and {b} cm. What are its volume and surface?",
        "Simplify ({c}x + {b})({c2}x - {c}).",
        "The mean of {c}, {d}, {e} and y is {f}. What is y?",
    ],
    "extraction": [
        "Here is a text. List who did what, as a table.\n\n{passage}\n\n{passage2}",
        "Read the two texts and say what they have in common.\n\n1. {passage}\n\n2. {passage2}",
        "Underline the most important words of this text with stars.\n\n{passage}",
        "Sort these sentences from the shortest to the longest.\n- {sentence}\n- {sentence2}\n- {sentence3}",
        "Put these sentences into the past tense.\n{sentence}\n{sentence2}",
        "Which of these two texts is easier to read, and why?\n\n{passage}\n\n{passage2}",
        "Answer only with the text below: what happened, where and when?\n\n{passage}",
        "Find the main claim of this text and one reason given for it.\n\n{passage}",
        "Turn this text into a list of questions and answers.\n\n{passage}",
        "Write this text again with all sentences in the future tense.\n\n{passage}",
        "Write a headline and three bullet points for this.\n\n{passage}",
        "Correct the mistakes and explain each.\n\n{sentence} {sentence2} {sentence3}",
    ],
    "longer writing": [
        "Write a postcard from {country} in which {person} tells {person2} about {topic}.",
        "Write a {tone} note that {person} leaves on the door of {person2}.",
        "Write the back cover of a novel about {person} and {person2} in {place}.",
        "Write a story that ends with this sentence: {sentence}",
        "Write the table of contents of a book on {topic} and {topic2}.",
        "Write a {tone} letter in which {person} complains to {person2} about {thing}.",
        "Write a toast by {person} at a party for {person2}.",
        "Tell a legend that explains why there is {topic}.",
        "Write the script of a podcast about {topic}, with two speakers.",
        "Join these sentences into one paragraph: {sentence} {sentence2} {sentence3}",
        "Write a riddle whose answer is {thing}.",
        "Write the rules of a game about {topic} for four players.",
        "Compose a song with two verses and a chorus about {place}.",
        "Write a {tone} conversation on the phone between {person} and {person2}.",
        "Write a formal proposal for a project on {topic}: goal, plan, cost, risk.",
    ],
    "advice": [
        "{problem}. What can I do?",
        "{problem}. Give me five tips in order of importance.",
        'My friend says: "{problem}." What should I answer?',
        "{problem}. Ask me three questions first, then advise me.",
        "How would {role} help with this: {problem}?",
        "Make a plan of four weeks for this: {problem}.",
        "What are good goals for {person} who is interested in {topic}?",
        "How can {person} get better at {topic}?",
        "What should I pack for a week in {country}, if I love {topic}?",
        "Suggest ten presents for {person} who likes {topic}.",
    ],
}
"""Longer tasks of more kinds, for --wide."""
SECOND = {
    "questions": [
        "Give an example.",
        "Explain it in simpler words.",
        "Now in one sentence.",
        "What else?",
    ],
    "writing": [
        "Make it shorter.",
        "Now make it funny.",
        "Rewrite it for children.",
        "Add a title.",
    ],
    "editing": [
        "Explain your answer.",
        "Do it again, differently.",
        "Now translate it into Spanish.",
    ],
    "sums": ["Explain the steps once more.", "What if all numbers were doubled?", "Are you sure?"],
    "code": ["Add error handling.", "Explain how it works.", "Can it be made faster?"],
}


def function_stub(line: str, draw: random.Random) -> str:
    """A signature with a docstring, in one of three styles."""
    name, arguments, what, *examples = [part.strip() for part in line.split("|")]
    if draw.random() < 0.5:
        arguments = ", ".join(argument.partition(":")[0] for argument in arguments.split(","))
    calls = [tuple(example.split(" -> ")) for example in examples]
    if draw.random() < 0.5:
        body = "".join(f"    >>> {call}\n    {value}\n" for call, value in calls)
    else:
        body = "".join(f"    {call} == {value}\n" for call, value in calls)
    return f'def {name}({arguments}):\n    """\n    {what}\n{body}    """\n'


def library_stubs() -> list[str]:
    """Functions of the standard library, cut behind their docstring."""
    found = set()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if {"test", "tests", "idlelib", "lib2to3", "site-packages"} & set(path.parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            what = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
            if what is None or node.name.startswith("_") or not 20 <= len(what) <= 800:
                continue
            lines = textwrap.indent(what, "    ").lstrip()
            head = f"def {node.name}({ast.unparse(node.args)}):"
            found.add(f'{head}\n    """\n    {lines}\n    """\n')
    return sorted(found)


def make_prompts(
    count: int, seed: int, *, library: bool, wide: bool = False
) -> list[dict[str, object]]:
    """`count` different prompts: id, category and one or two turns."""
    draw = random.Random(seed)
    stubs = library_stubs() if library else []
    roles, problems = _list(ROLES), _list(PROBLEMS)
    topics, people, places = _list(TOPICS), _list(PEOPLE), _list(PLACES)
    things, ideas, functions = _list(THINGS), _list(CODE_IDEAS), _lines(FUNCTIONS)
    languages, formats, tones = _list(LANGUAGES), _list(FORMATS), _list(TONES)
    sentences, passages = _lines(SENTENCES), _lines(PASSAGES)
    countries = topics[topics.index("Japan") : topics.index("Italy") + 1]
    if wide:
        topics += _list(MORE_TOPICS)
    names = ["Anna", "Ben", "Chen", "Dana", "Emil", "Fatima", "Gina", "Hugo", "Ines", "Jack"]

    def fill(template: str) -> str:
        first, step = draw.randrange(1, 9), draw.randrange(2, 7)
        name, name2, name3 = draw.sample(names, 3)
        topic, topic2 = draw.sample(topics, 2)
        person, person2 = draw.sample(people, 2)
        more: dict[str, object] = {}
        if wide:
            more = {
                "role": draw.choice(roles),
                "role2": draw.choice(roles),
                "problem": (problem := draw.choice(problems))[0].upper() + problem[1:],
                "passage2": draw.choice(passages),
                "sentence2": draw.choice(sentences),
                "sentence3": draw.choice(sentences),
            }
        return template.format(
            topic=topic,
            topic2=topic2,
            person=person,
            person2=person2,
            place=draw.choice(places),
            thing=draw.choice(things),
            country=draw.choice(countries),
            sentence=draw.choice(sentences),
            passage=draw.choice(passages),
            language=draw.choice(languages),
            format=draw.choice(formats),
            tone=draw.choice(tones),
            idea=draw.choice(ideas),
            coding=draw.choice(["Java", "C++", "JavaScript", "C", "Go"]),
            code=draw.choice(stubs)
            if stubs and draw.random() < 0.8
            else function_stub(draw.choice(functions), draw),
            plural=draw.choice(["cats", "penguins", "bees", "horses"]),
            name=name,
            name2=name2,
            name3=name3,
            a=draw.randrange(20, 400),
            b=draw.randrange(5, 60),
            c=first,
            c2=first * 2,
            d=first + step,
            e=first + 2 * step,
            f=first + 3 * step,
            **more,
        )

    # Shares of what users ask for; code to finish has the longest prompts.
    kinds: list[tuple[str, list[str], int]] = [
        ("questions", QUESTIONS, 26),
        ("writing", WRITING, 22),
        ("editing", EDITING, 16),
        ("sums", SUMS, 8),
        ("code", CODE, 10),
        ("code", FINISH, 18),
    ]
    if wide:
        weights = (20, 10, 8, 10, 10, 14, 10)
        kinds += [(name, WIDE[name], share) for name, share in zip(WIDE, weights, strict=True)]
    shares = [share for *_, share in kinds]
    found: dict[str, dict[str, object]] = {}
    while len(found) < count:
        category, templates, _ = draw.choices(kinds, shares)[0]
        prompt = fill(draw.choice(templates))
        turns = [prompt]
        if category in SECOND and draw.random() < 0.15:
            turns.append(draw.choice(SECOND[category]))
        found.setdefault(prompt, {"id": len(found), "category": category, "turns": turns})
    return list(found.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--library", action="store_true", help="with Python's own functions")
    parser.add_argument("--wide", action="store_true", help="more subjects and kinds of tasks")
    args = parser.parse_args()
    for prompt in make_prompts(args.count, args.seed, library=args.library, wide=args.wide):
        sys.stdout.write(json.dumps(prompt, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
