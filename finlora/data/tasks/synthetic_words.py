"""Word lists of the generated financial set. All names are invented; tags are public US GAAP names."""

from __future__ import annotations

# A name is two syllables, so that a test name is new but its parts are not.
FIRST_SYLLABLES = (
    "Ar", "Bel", "Cal", "Dor", "El", "Fen", "Gal", "Hol", "Il", "Jar", "Kel", "Lor", "Mar", "Nor", "Os", "Pel",
    "Quin", "Ros", "Sel", "Tor", "Ul", "Ver", "Wes", "Yar", "Zan", "Bran", "Cor", "Dun",
)  # fmt: skip
SECOND_SYLLABLES = (
    "vale", "mont", "wick", "den", "stad", "mere", "holm", "lund", "gate", "field", "ston", "bury", "croft", "haven",
    "dale", "worth",
)  # fmt: skip
COMPANY_FORMS = ("Inc", "Corp", "Bank", "Holdings", "Group", "Energy", "Foods", "Partners", "Capital", "Trust")
FIRST_NAMES = (
    "Anna", "Boris", "Clara", "David", "Elena", "Frank", "Greta", "Hugo", "Irene", "James", "Karin", "Louis", "Maria",
    "Nils", "Olga", "Peter", "Rosa", "Simon", "Tina", "Victor",
)  # fmt: skip

# Whether a change is good news depends on what changed: a rise in losses is bad, a fall in debt is good.
GOOD_NOUNS = ("profit", "revenue", "net sales", "earnings", "operating income", "cash flow", "order intake", "margin")
BAD_NOUNS = ("net loss", "debt", "costs", "write-downs")
UP_VERBS = ("rose", "increased", "grew", "climbed", "jumped")
DOWN_VERBS = ("fell", "decreased", "dropped", "declined", "shrank")
HIGHER, LOWER = ("higher", "upwards"), ("lower", "downwards")
PLEASED, WORRIED = ("pleased", "helped"), ("worried", "hurt")
FLAT_VERBS = ("was unchanged", "stayed flat", "did not change", "was the same as before")
GOOD_EVENTS = ("raised its dividend", "won a large contract", "lifted its outlook", "beat the forecast")
BAD_EVENTS = ("cut its dividend", "lost a large contract", "lowered its outlook", "missed the forecast")
NEUTRAL_EVENTS = (
    "will hold its annual meeting in {month}",
    "moved its head office to {city}",
    "named a new member of the board",
    "will publish its report in {month}",
    "opened its books to the auditor in {month}",
    "has its shares listed in {city}",
)
MONTHS = ("January", "February", "March", "April", "May", "June", "July", "September", "October", "November")

METALS = ("Gold", "Silver", "Copper", "Platinum", "Palladium", "Zinc")
PRICE_UP = ("gains", "rises", "climbs", "advances", "rallies", "edges up")
PRICE_DOWN = ("falls", "drops", "slips", "loses", "declines", "edges down")
PRICE_FLAT = ("holds steady", "is little changed", "trades flat")
METAL_NEWS = ("mine opens", "exports are taxed", "traders meet", "stocks are counted", "refinery hires")
REASONS = ("as the dollar rises", "as the dollar falls", "as bonds gain", "as bonds slip", "before the bank's meeting")

ENTITY_SENTENCES = (
    "This agreement is made between {organization} and {person} , with an office in {location} .",
    "{person} signed the loan for {organization} in {location} .",
    "The borrower , {organization} , is registered in {location} and is represented by {person} .",
    "In {location} , the court heard {person} on the claims of {organization} .",
    "Notices to {organization} shall be sent to {person} at its address in {location} .",
    "{organization} shall pay the lender in {location} when {person} so asks .",
)

LINE_ITEMS = {
    "Revenues": "Revenue",
    "NetIncomeLoss": "Net Income",
    "Assets": "Total Assets",
    "AssetsCurrent": "Current Assets",
    "Liabilities": "Total Liabilities",
    "LiabilitiesCurrent": "Current Liabilities",
    "StockholdersEquity": "Shareholders' Equity",
    "InventoryNet": "Inventory",
    "AccountsPayableCurrent": "Accounts Payable",
    "AccountsReceivableNetCurrent": "Accounts Receivable",
    "OperatingIncomeLoss": "Operating Income",
    "GrossProfit": "Gross Profit",
    "IncomeTaxExpenseBenefit": "Income Tax Expense",
    "InterestExpense": "Interest Expense",
    "Goodwill": "Goodwill",
    "LongTermDebt": "Long-Term Debt",
    "CostOfRevenue": "Cost of Revenue",
    "RetainedEarningsAccumulatedDeficit": "Retained Earnings",
}

# Line items of formulas, as shares of a filing's revenue from lowest to highest: figures that are consistent with each other.
SHARES_OF_REVENUE = {
    "Revenues": (1.0, 1.0),
    "CostOfRevenue": (0.3, 0.9),
    "OperatingIncomeLoss": (0.05, 0.25),
    "NetIncomeLoss": (-0.1, 0.2),
    "Assets": (0.8, 3.0),
    "AssetsCurrent": (0.3, 0.9),
    "InventoryNet": (0.05, 0.25),
    "Liabilities": (0.3, 1.5),
    "LiabilitiesCurrent": (0.1, 0.6),
    "StockholdersEquity": (0.2, 1.2),
    "InterestExpense": (0.005, 0.05),
}

FORMULAS = (  # name, expression, decimals
    ("gross profit margin in per cent", "(Revenues - CostOfRevenue) / Revenues * 100", 1),
    ("operating margin in per cent", "OperatingIncomeLoss / Revenues * 100", 1),
    ("net profit margin in per cent", "NetIncomeLoss / Revenues * 100", 1),
    ("return on assets in per cent", "NetIncomeLoss / Assets * 100", 1),
    ("return on equity in per cent", "NetIncomeLoss / StockholdersEquity * 100", 1),
    ("current ratio", "AssetsCurrent / LiabilitiesCurrent", 2),
    ("quick ratio", "(AssetsCurrent - InventoryNet) / LiabilitiesCurrent", 2),
    ("debt-to-equity ratio", "Liabilities / StockholdersEquity", 2),
    ("interest coverage ratio", "OperatingIncomeLoss / InterestExpense", 1),
    ("working capital", "AssetsCurrent - LiabilitiesCurrent", 0),
)
