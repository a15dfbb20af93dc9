"""Example table of a task: generated letters to a bank and the department that answers each. Seeded, as a real table looks.

Each letter has a number, a date of 2024 or 2025, the channel it came by, its text and its department. Some texts hold commas,
quotes and line breaks; some letters came twice, some have no text, some labels are written differently.
"""

from __future__ import annotations

import csv
import io
import random
from datetime import date, timedelta
from pathlib import Path

from finlora.durable import write_whole

NUM_ROWS = 720
SEED = 20250101
HEADER = ("letter_id", "received", "channel", "letter", "department")
_CHANNELS = ("branch", "letter", "phone", "web")
_TOPICS = {
    "cards": (
        ("My debit card", "The new credit card", "My partner's card", "The replacement card", "Your prepaid card"),
        (
            "was refused at {shop} although there is money on the account",
            "has not arrived after {number} days",
            "was swallowed by the cash machine of {shop}",
            "was copied, and somebody paid {amount} with it at {shop}",
            "has a PIN that no machine takes",
            "no longer pays without contact since {day}",
        ),
    ),
    "loans": (
        ("My mortgage", "The loan for our car", "The credit of my father", "Our building loan", "My instalment loan"),
        (
            "has been waiting for a decision for {number} weeks",
            "has another interest rate than {who} told me",
            "costs {amount} more if I repay it early",
            "was refused without a reason",
            "was collected twice on {day}, {amount} each time",
            "needs a pause of {number} months since I lost my work",
        ),
    ),
    "fees": (
        (
            "The charge of {amount}",
            "Your new price of {amount} a month",
            "The {amount} for a transfer",
            "A fee of {amount}",
        ),
        (
            "was never explained to me",
            "contradicts your own price list",
            "is on my statement of {day} for the second time",
            "is more than all other banks ask",
            "was to end when I am a customer for {number} years",
            "must be paid back before {day}",
        ),
    ),
    "online": (
        ("Your app", "The web page", "The login", "The transfer form", "The mailbox in online banking"),
        (
            "stops each time I open it since {day}",
            "does not take my password any more",
            "shows the balance of {number} days ago",
            "was not to be reached for {number} hours",
            "never sends the code that it asks for",
            "finds none of my payments to {shop}",
        ),
    ),
    "service": (
        ("{who}", "The lady at the counter", "Your hotline", "My adviser", "The branch at the station"),
        (
            "let me wait for {number} minutes and then sent me home",
            "promised to call back on {day}, and nobody did",
            "was rude and would not listen",
            "gave me wrong advice about my savings",
            "was closed on {day} without a note at the door",
            "has sent me from one desk to another for {number} days",
        ),
    ),
}
_OPENINGS = (
    "",
    "",
    "Good morning, ",
    "Dear Sir or Madam,\n",
    "Once more: ",
    "I must complain. ",
    "To the board: ",
    "Hello, ",
)
_ENDINGS = (
    ".",
    ". Please look into it.",
    ", and I expect an answer by {day}.",
    '. Is this your "service"?',
    ". I have been with you for {number} years.",
    ".\nWith kind regards, {who}",
    ". {who} knows about it.",
    ". I have written this before, without an answer.",
)
_SHOPS = ("the bakery", "a petrol station", "the pharmacy", "the supermarket", "a hotel in Lyon", "the station kiosk")
_PEOPLE = ("Ms Ortega", "Mr Lind", "Ms Okafor", "Mr Abadi", "Ms Tanaka", "Mr Novak")
_DAYS = ("Monday", "Tuesday", "Friday", "1 March", "15 May", "the 3rd", "30 June", "Christmas Eve")


def write_example(path: Path) -> int:
    """Write the table as CSV with a byte-order mark, as spreadsheets do, and return its number of rows."""
    rows = make_rows()
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEADER)
    writer.writerows(rows)
    write_whole(path, "\ufeff" + text.getvalue())
    return len(rows)


def make_rows() -> list[list[str]]:
    """Return the rows in the order of HEADER, the same ones at each call."""
    sampler = random.Random(SEED)
    rows = []
    for number in range(NUM_ROWS):
        department = sampler.choice(tuple(_TOPICS))
        received = date(2024, 1, 1) + timedelta(days=number * 700 // NUM_ROWS)
        text = _write_letter(sampler, department)
        rows.append([f"L{number + 1:04}", received.isoformat(), sampler.choice(_CHANNELS), text, department])
    changed = sampler.sample(range(1, NUM_ROWS), 20)
    for row in changed[:8]:  # the letter came twice
        rows[row][3:] = rows[row - 1][3:]
    for row in changed[8:13]:
        rows[row][3] = ""
    for row in changed[13:]:
        rows[row][4] = rows[row][4].capitalize()
    return rows


def _write_letter(sampler: random.Random, department: str) -> str:
    subjects, faults = _TOPICS[department]
    parts = (sampler.choice(_OPENINGS), sampler.choice(subjects), " ", sampler.choice(faults), sampler.choice(_ENDINGS))
    values = {
        "shop": sampler.choice(_SHOPS),
        "who": sampler.choice(_PEOPLE),
        "day": sampler.choice(_DAYS),
        "number": str(sampler.randint(2, 40)),
        "amount": f"EUR {sampler.uniform(3, 1900):,.2f}",
    }
    return "".join(part.format(**values) for part in parts)
