"""Names and numbers of the demo's conversations, and the fifth of them that training never sees.

Real cities and countries are lists; made-up cities and words are syllables drawn by chance, so that the model
has to learn to copy and not to remember.
"""

from __future__ import annotations

import zlib
from random import Random

HELD_OUT_PART = 5  # one in so many


def is_held_out(text: str) -> bool:
    """Whether a name, number or phrasing belongs to the fifth kept from training.

    A function of the case-folded text alone, so that made-up names are divided like real ones.
    """
    return zlib.crc32(text.casefold().encode()) % HELD_OUT_PART == 0


CAPITALS: dict[str, str] = {
    "Albania": "Tirana", "Argentina": "Buenos Aires", "Australia": "Canberra", "Austria": "Vienna",
    "Belgium": "Brussels", "Bolivia": "Sucre", "Brazil": "Brasilia", "Bulgaria": "Sofia", "Canada": "Ottawa",
    "Chile": "Santiago", "China": "Beijing", "Colombia": "Bogota", "Croatia": "Zagreb", "Cuba": "Havana",
    "Cyprus": "Nicosia", "Denmark": "Copenhagen", "Ecuador": "Quito", "Egypt": "Cairo", "Estonia": "Tallinn",
    "Ethiopia": "Addis Ababa", "Finland": "Helsinki", "France": "Paris", "Germany": "Berlin",
    "Ghana": "Accra", "Greece": "Athens", "Hungary": "Budapest", "Iceland": "Reykjavik", "India": "New Delhi",
    "Indonesia": "Jakarta", "Iran": "Tehran", "Iraq": "Baghdad", "Ireland": "Dublin", "Italy": "Rome",
    "Jamaica": "Kingston", "Japan": "Tokyo", "Jordan": "Amman", "Kenya": "Nairobi", "Latvia": "Riga",
    "Lebanon": "Beirut", "Lithuania": "Vilnius", "Malaysia": "Kuala Lumpur", "Mexico": "Mexico City",
    "Mongolia": "Ulaanbaatar", "Morocco": "Rabat", "Nepal": "Kathmandu", "Netherlands": "Amsterdam",
    "New Zealand": "Wellington", "Nigeria": "Abuja", "Norway": "Oslo", "Pakistan": "Islamabad",
    "Peru": "Lima", "Philippines": "Manila", "Poland": "Warsaw", "Portugal": "Lisbon", "Romania": "Bucharest",
    "Russia": "Moscow", "Serbia": "Belgrade", "Slovakia": "Bratislava", "Slovenia": "Ljubljana",
    "South Korea": "Seoul", "Spain": "Madrid", "Sweden": "Stockholm", "Switzerland": "Bern",
    "Thailand": "Bangkok", "Tunisia": "Tunis", "Turkey": "Ankara", "Uganda": "Kampala", "Ukraine": "Kyiv",
    "Uruguay": "Montevideo", "Vietnam": "Hanoi",
}  # fmt: skip

_OTHER_CITIES = """
Aachen|Aberdeen|Adelaide|Aleppo|Alexandria|Almaty|Antalya|Antwerp|Asheville|Atlanta|Auckland|Austin|Baku
Bali|Baltimore|Bangalore|Barcelona|Bari|Basel|Basra|Bergen|Bilbao|Birmingham|Boise|Bologna|Bonn|Bordeaux
Boston|Bremen|Brisbane|Bristol|Bruges|Brno|Buffalo|Busan|Cali|Cambridge|Cancun|Cape Town|Cardiff|Casablanca
Catania|Charlotte|Chengdu|Chennai|Chicago|Cleveland|Cologne|Cordoba|Cork|Cusco|Dakar|Dallas|Darwin|Denver
Detroit|Doha|Dortmund|Dresden|Dubai|Durban|Edinburgh|El Paso|Essen|Faro|Fez|Florence|Frankfurt|Fresno
Fukuoka|Galway|Gdansk|Geneva|Genoa|Ghent|Girona|Glasgow|Granada|Graz|Guadalajara|Guangzhou|Haifa|Halifax
Hamburg|Hamilton|Hangzhou|Hannover|Harare|Hiroshima|Hobart|Hong Kong|Honolulu|Houston|Hyderabad|Ibiza
Innsbruck|Istanbul|Izmir|Jeddah|Juneau|Karachi|Kazan|Kobe|Kolkata|Krakow|Kyoto|Lagos|Lahore|Las Vegas
Leeds|Leipzig|Lille|Linz|Liverpool|London|Los Angeles|Luanda|Lucerne|Lusaka|Luxembourg|Lviv|Lyon|Macau
Malaga|Malmo|Manchester|Maputo|Marrakesh|Marseille|Medellin|Melbourne|Memphis|Miami|Milan|Minsk|Mombasa
Monaco|Montreal|Mumbai|Munich|Muscat|Nagoya|Nanjing|Naples|Nashville|New Orleans|New York|Newcastle|Nice
Odense|Odessa|Orlando|Osaka|Oxford|Palermo|Panama City|Perth|Philadelphia|Phoenix|Pisa|Pittsburgh|Plovdiv
Porto|Portland|Porto Alegre|Poznan|Prague|Puebla|Pune|Quebec City|Queenstown|Recife|Rio de Janeiro|Riyadh
Rosario|Rotterdam|Saint Petersburg|Salamanca|Salt Lake City|Salvador|Salzburg|Samarkand|San Antonio
San Diego|San Francisco|San Jose|Santa Fe|Sao Paulo|Sapporo|Sarajevo|Seattle|Seville|Shanghai|Sheffield
Shenzhen|Siena|Singapore|Skopje|Split|Stavanger|Strasbourg|Stuttgart|Suzhou|Sydney|Taipei|Tampa|Tampere
Tangier|Tbilisi|Tel Aviv|Thessaloniki|Tianjin|Toledo|Toronto|Toulouse|Trieste|Trondheim|Tucson|Turin|Turku
Uppsala|Utrecht|Valencia|Valletta|Vancouver|Varna|Venice|Verona|Vladivostok|Washington|Winnipeg|Wroclaw
Wuhan|Xiamen|Yangon|Yerevan|York|Zanzibar|Zaragoza|Zurich
"""


def listed(text: str) -> list[str]:
    """Entries of a table: divided by bars and lines if there are bars, else by spaces."""
    return text.replace("\n", "|").strip("|").split("|") if "|" in text else text.split()


CITIES: tuple[str, ...] = tuple(sorted({*CAPITALS.values(), *listed(_OTHER_CITIES)}))

_ONSETS = [
    *listed(
        "b c d f g h j k l m n p r s t v w z br ch cl cr dr fl fr gl gr kh kl kr pl pr qu sh sk sl sn st"
    ),
    *listed("str sv th tr ts y x ph"),
    *[""] * 4,
]
_VOWELS = listed("a a a e e e i i o o o u u y ai au ea ee ei ia ie io oa oo ou ue ae é ö ü ã í")
_CODAS = [
    *listed(
        "b ck d f g l m n n n ng nd nt r r rg rk rn rt s s ss st t t th x z lm ld ll sk ch sh wn v p q j gh"
    ),
    *[""] * 24,
]
_LEAD_WORDS = listed("New San Port Saint El Los Fort Santa Upper Old Lake North Rio Cape Mount Bad La Al")
_TAIL_WORDS = listed("City Falls Bay Beach Springs Hills Valley Town Island Park")


def made_up_word(rng: Random) -> str:
    """One to four syllables, lower case."""
    num_syllables = rng.choice((1, 2, 2, 2, 3, 3, 4))
    return "".join(
        rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(num_syllables)
    )


def made_up_city(rng: Random) -> str:
    """One to three words, mostly capitalised; never a real city's name. Of either side of the split."""
    words = [made_up_word(rng).capitalize()]
    shape = rng.random()
    if shape < 0.12:
        words.insert(0, rng.choice(_LEAD_WORDS))
    elif shape < 0.18:
        words.append(rng.choice(_TAIL_WORDS))
    elif shape < 0.30:
        words.append(made_up_word(rng).capitalize())
    elif shape < 0.34:
        words = ["-".join((words[0], made_up_word(rng).capitalize()))]
    elif shape < 0.37:
        words += [rng.choice(("de", "on", "am", "del", "upon")), made_up_word(rng).capitalize()]
    name = " ".join(words)
    if name in CITIES:
        return made_up_city(rng)
    return name.lower() if rng.random() < 0.08 else name


def city(rng: Random, *, held_out: bool, real_share: float = 0.4) -> str:
    """A city of one side of the split, real with probability `real_share`."""
    while True:
        name = rng.choice(CITIES) if rng.random() < real_share else made_up_city(rng)
        if is_held_out(name) == held_out:
            return name


def number(rng: Random, low: int, high: int, *, held_out: bool) -> int:
    """A whole number in [low, high] of one side of the split."""
    while True:
        value = rng.randint(low, high)
        if is_held_out(str(value)) == held_out:
            return value


def word(rng: Random, *, held_out: bool) -> str:
    """A made-up word of one side of the split."""
    while True:
        text = made_up_word(rng)
        if is_held_out(text) == held_out:
            return text
