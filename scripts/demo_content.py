"""Hold the hand-written content of the demo preference pairs (data only).

Every family is a table with one row per line (a backslash continues it) and " | " between the columns.
Its wordings, answers, topic, openers and input are format strings over the columns {0}, {1}, ...; openers
also know {topic} and {Topic}, the same phrase starting with a capital.
"""

from typing import NamedTuple


class Family(NamedTuple):
    """Describe one kind of prompt: how it is asked, answered and talked around."""

    name: str
    open_ended: bool
    wordings: tuple[str, ...]
    answers: tuple[str, ...]
    topic: str
    rows: str
    openers: tuple[str, ...] = ()
    input: str = ""


# What a rambling answer says before it comes to the point, whatever the subject.
PLEASANTRIES = (
    "Great question! I would be very happy to help you with that.",
    "Thank you so much for coming to me with this today.",
    "Sure thing! Let me think about this carefully for a moment.",
    "What an interesting thing to ask! I am really glad you did.",
    "Hello there! I am delighted to assist you with your request.",
    "Of course! I would love to help you find what you need.",
    "Absolutely! It is always a pleasure to work on something like this.",
    "I'm glad you asked, because this comes up more often than you might think.",
    "I'm here to help you with whatever you need, and this is no exception.",
    "Certainly! There is a lot that could be said here.",
    "Wow, that is a really thoughtful question, and I appreciate it.",
    "Okay, let us take a closer look at this together.",
    "Ah, this is a classic, and many people have asked it before you.",
    "I'd be delighted to share what I know about this with you.",
    "That is an excellent thing to be curious about!",
    "Let me start by saying that this is a wonderful thing to ask.",
    "No problem at all! I am always ready to help with questions like this one.",
    "Hi! I hope you are having a lovely day so far.",
    "This is a fun one, and I am excited to answer it for you.",
    "As a helpful assistant, I will do my very best to answer this.",
)

# The same, but restating what was asked.
RESTATEMENTS = (
    "You are asking about {topic}, which is a fascinating subject.",
    "Thank you for asking me about {topic} today!",
    "When it comes to {topic}, there are many things to consider.",
    "So, you would like to know more about {topic}.",
    "I understand that you want to hear something about {topic}.",
    "{Topic} is something that many people wonder about.",
    "The matter of {topic} is an interesting one to think about.",
    "Let us talk about {topic}, since that is what you brought up.",
    "There is a great deal that one could say about {topic}.",
    "I see that your request is about {topic}.",
    "If I understand you correctly, this is about {topic}.",
    "{Topic} can be looked at in a number of different ways.",
    "Before I answer, let me say a few words about {topic}.",
    "I'm glad to hear that you are interested in {topic}.",
)

# Bridges between the filler and the answer; those with a comma at the end continue into it.
BRIDGES = (
    "After giving it some thought, I can tell you the following.",
    "With all of that in mind, here is my answer.",
    "So, without further ado, here is what I would say.",
    "Here is what you need to know.",
    "Let me break it down for you.",
    "Taking everything into account, this is my response.",
    "Having considered it from several sides, I would say this.",
    "Here it comes, as clearly as I can put it.",
    "To get to the heart of it,",
    "In simple terms,",
    "Generally speaking,",
    "At the end of the day,",
    "Broadly speaking, and without going into every detail,",
    "To put it in a few simple words,",
)

# What a rambling answer adds once everything has been said.
CLOSERS = (
    "I hope that this answers your question!",
    "Feel free to ask me if you need anything else.",
    "Please let me know if you would like to hear more about it.",
    "I trust that this information will be useful to you.",
    "Do not hesitate to come back with more questions at any time.",
    "I hope this helps, and I wish you a wonderful day!",
    "It was a pleasure to look into this with you.",
    "If anything is unclear, I am more than happy to explain it again.",
    "And that, in a nutshell, is all there is to it.",
    "Is there anything else that I can assist you with today?",
    "Thank you again for giving me the chance to help.",
    "Of course, you can always ask me to go over it once more.",
)

# Closers in the manner of an essay, for prompts that invite one.
ESSAY_CLOSERS = (
    "Overall, {topic} is something that is well worth thinking about.",
    "It is important to note that there is much more to say about this.",
    "In conclusion, {topic} is a subject with many different sides.",
    "However, it is essential to keep in mind that every situation is a little different.",
    "Furthermore, there are several other factors that could be considered here.",
    "By keeping this in mind, you can gain a deeper understanding of the whole matter.",
    "This is just one of the many aspects that make this topic so interesting.",
    "All in all, it is fair to say that this plays an important role in our lives.",
    "Additionally, it is worth noting that opinions and details may vary.",
    "There are, of course, many other things that could be mentioned as well.",
    "In summary, it is a topic that continues to interest people all over the world.",
    "Ultimately, {topic} is something that each of us can learn more about.",
    "It is also worth remembering that a lot has been written about this.",
    "This is a key point, and it is important to understand it properly.",
)

OPEN_FAMILIES = (
    Family(
        "why in nature",
        True,
        ("{0}", "{0}", "Explain why {1}.", "Can you tell me why {1}?", "What is the reason that {1}?"),
        ("{2}",),
        "why {1}",
        """
        Why is the sky blue? | the sky is blue | The air scatters blue light more than the other colours.
        Why do leaves change colour in autumn? | leaves change colour in autumn | \
            Their green pigment breaks down, so the other pigments show.
        Why is the sea salty? | the sea is salty | \
            Rivers have carried salt from the rocks into the sea for ages.
        Why do we have seasons? | we have seasons | \
            The axis of the Earth is tilted as it travels around the sun.
        Why does ice float on water? | ice floats on water | Ice is less dense than liquid water.
        Why does the moon seem to change shape? | the moon seems to change shape | \
            We see different parts of its sunlit side as it orbits the Earth.
        Why do stars twinkle? | stars twinkle | Moving air in the atmosphere bends their light back and forth.
        Why do cats purr? | cats purr | \
            Cats mostly purr when they feel content, and sometimes to calm themselves.
        Why do birds migrate? | birds migrate | Birds move to places with more food and better nesting sites.
        Why do bears sleep through the winter? | bears sleep through the winter | \
            Food is scarce in winter, so bears rest to save energy.
        Why do flowers have bright colours? | flowers have bright colours | \
            Bright colours attract the insects and birds that spread their pollen.
        Why does thunder come after lightning? | thunder comes after lightning | \
            Light travels much faster than sound, so the flash reaches us first.
        Why do camels have humps? | camels have humps | \
            Their humps store fat that they can use when food is scarce.
        Why do zebras have stripes? | zebras have stripes | \
            Scientists think that the stripes help to keep biting flies away.
        Why do dogs pant? | dogs pant | Panting cools dogs down because water evaporates from their tongues.
        Why do cacti have spines? | cacti have spines | The spines protect the plant from hungry animals.
        Why does rain fall from clouds? | rain falls from clouds | \
            Droplets in a cloud grow until they are too heavy to stay up.
        Why can owls hunt at night? | owls can hunt at night | \
            Owls see well in dim light and have very sharp hearing.
        Why do deserts get cold at night? | deserts get cold at night | \
            Dry air and clear skies let the heat of the day escape quickly.
        Why do spiders build webs? | spiders build webs | Their sticky webs trap the insects that they eat.
        Why do plants need sunlight? | plants need sunlight | Plants use the energy of sunlight to make sugar.
        Why do we see rainbows? | we see rainbows | Raindrops split sunlight into its different colours.
        """,
        (
            "There are several reasons why {1}, and they have been studied for a long time.",
            "The answer to this question lies in a truly fascinating process of nature.",
            "The question of why {1} is one that people have asked for ages.",
        ),
    ),
    Family(
        "why in daily life",
        True,
        ("{0}", "{0}", "Explain in simple words why {1}.", "Do you know why {1}?", "Why is it that {1}?"),
        ("{2}",),
        "why {1}",
        """
        Why does bread dough rise? | bread dough rises | Yeast makes gas bubbles that puff up the dough.
        Why do onions make us cry? | onions make us cry | \
            Cutting an onion releases a gas that stings the eyes.
        Why do people yawn? | people yawn | \
            Nobody knows for certain, but yawning is linked to tiredness and boredom.
        Why do we need sleep? | we need sleep | \
            Sleep lets the body repair itself and the brain store memories.
        Why is exercise good for us? | exercise is good for us | \
            Exercise strengthens the heart and muscles and lifts the mood.
        Why should people brush their teeth? | people should brush their teeth | \
            Brushing removes the plaque that causes tooth decay.
        Why do we sweat? | we sweat | Sweat cools the skin as it evaporates.
        Why does iron rust? | iron rusts | Iron reacts with oxygen and water to form iron oxide.
        Why do cut apples turn brown? | cut apples turn brown | Oxygen in the air reacts with the cut flesh.
        Why does popcorn pop? | popcorn pops | Water inside the kernel turns to steam and bursts the shell.
        Why should cyclists wear helmets? | cyclists should wear helmets | \
            A helmet protects the head in a fall.
        Why does a metal spoon feel cold? | a metal spoon feels cold | \
            Metal draws heat away from your hand quickly.
        Why is smoking harmful? | smoking is harmful | \
            Smoking damages the lungs and the heart and can cause cancer.
        Why do we put salt on icy roads? | we put salt on icy roads | \
            Salt lowers the freezing point of water, so the ice melts.
        Why do parents read bedtime stories? | parents read bedtime stories | \
            Bedtime stories help children to relax and to learn new words.
        Why do shops hold sales? | shops hold sales | Lower prices bring in customers and clear out old stock.
        Why does soap clean our hands? | soap cleans our hands | \
            Soap lifts grease and germs so that water can rinse them away.
        Why do planes leave white trails? | planes leave white trails | \
            Water vapour in their exhaust freezes into tiny ice crystals.
        Why do we get hiccups? | we get hiccups | Hiccups come from sudden twitches of the diaphragm.
        Why do muscles ache after sport? | muscles ache after sport | \
            Hard exercise causes tiny tears in the muscle fibres.
        Why do we use passwords? | we use passwords | Passwords keep other people out of our accounts.
        Why do ears pop on a plane? | ears pop on a plane | \
            The air pressure changes faster than the ear can balance it.
        """,
        (
            "There are many different reasons why {1}, and all of them matter.",
            "It is easy to take it for granted, but have you ever thought about why {1}?",
            "Understanding why {1} can help us in our everyday lives.",
        ),
    ),
    Family(
        "define science",
        True,
        (
            "What is {0}?",
            "What is {0}?",
            "Explain what {0} is.",
            "In simple terms, what is {0}?",
            "Can you tell me what {0} is?",
        ),
        ("{1}",),
        "{0}",
        """
        a volcano | A volcano is an opening in the Earth where molten rock comes out.
        photosynthesis | Photosynthesis is how plants use light to turn water and carbon dioxide into sugar.
        gravity | Gravity is the force that pulls objects with mass towards each other.
        an atom | An atom is the smallest unit of a chemical element.
        a glacier | A glacier is a large mass of ice that flows slowly over land.
        evaporation | Evaporation is the change of a liquid into a gas.
        a solar eclipse | A solar eclipse happens when the moon blocks the light of the sun.
        friction | Friction is the force that slows surfaces down as they rub together.
        a mammal | A mammal is a warm-blooded animal that feeds its young with milk.
        an ecosystem | An ecosystem is a community of living things and their surroundings.
        a vaccine | A vaccine trains the body to fight a disease before it strikes.
        DNA | DNA is the molecule that carries the genetic instructions of living things.
        a comet | A comet is a ball of ice and dust that orbits the sun.
        a fossil | A fossil is the preserved remains or trace of an ancient living thing.
        erosion | Erosion is the wearing away of land by water, wind or ice.
        a magnet | A magnet is an object that attracts iron and some other metals.
        an earthquake | An earthquake is a shaking of the ground caused by moving rock.
        a galaxy | A galaxy is a huge group of stars held together by gravity.
        the tide | The tide is the regular rise and fall of the sea, caused mainly by the moon.
        a hurricane | A hurricane is a powerful tropical storm with strong spinning winds.
        an antibiotic | An antibiotic is a medicine that kills bacteria or stops their growth.
        pollination | Pollination is the transfer of pollen that lets plants make seeds.
        """,
        (
            "{Topic} is a fascinating part of the world of science.",
            "{Topic} is a fundamental concept that has been studied for a very long time.",
            "To understand what {0} is, it helps to look at the bigger picture first.",
        ),
    ),
    Family(
        "define everyday",
        True,
        (
            "What is {0}?",
            'What does the term "{1}" mean?',
            "Define {0} in plain words.",
            "How would you explain {0} to a child?",
            "Give me a definition of {0}.",
        ),
        ("{2}",),
        "{0}",
        """
        inflation | inflation | Inflation is a general rise in prices over time.
        an algorithm | algorithm | An algorithm is a step-by-step procedure for solving a problem.
        a budget | budget | A budget is a plan for spending and saving money.
        democracy | democracy | Democracy is a system in which the people choose their government.
        a metaphor | metaphor | A metaphor describes one thing by calling it another.
        a web browser | web browser | A web browser is a program for viewing pages on the internet.
        interest on a loan | interest on a loan | Interest is the price you pay for borrowing money.
        a deadline | deadline | A deadline is the latest time by which something must be done.
        a synonym | synonym | A synonym is a word with nearly the same meaning as another.
        a recipe | recipe | A recipe is a set of instructions for preparing a dish.
        a haiku | haiku | A haiku is a short Japanese poem of three lines.
        an autobiography | autobiography | \
            An autobiography is the story of a life told by the person who lived it.
        insurance | insurance | Insurance is a contract that pays you back for certain losses.
        a mortgage | mortgage | A mortgage is a loan for buying a home.
        jet lag | jet lag | Jet lag is the tiredness you feel after crossing several time zones.
        a proverb | proverb | A proverb is a short, well-known saying that gives advice.
        a spreadsheet | spreadsheet | A spreadsheet is a table for organising and calculating data.
        a computer virus | computer virus | A computer virus is a harmful program that copies itself.
        recycling | recycling | Recycling means turning waste into material for new things.
        a symphony | symphony | A symphony is a long piece of music for an orchestra.
        a passport | passport | A passport is an official document that proves who you are abroad.
        empathy | empathy | Empathy is the ability to understand how another person feels.
        """,
        (
            "{Topic} is something that comes up in many different situations in life.",
            'The word "{1}" is used by a lot of people, often without much thought.',
            "{Topic} is an important idea that affects many of us in one way or another.",
        ),
    ),
    Family(
        "how things work",
        True,
        ("{0}", "{0}", "Explain how {1}.", "Can you describe how {1}?", "I would like to know how {1}."),
        ("{2}",),
        "how {1}",
        """
        How do bees make honey? | bees make honey | \
            Bees collect nectar and dry it in the hive until it thickens.
        How does a microwave heat food? | a microwave heats food | \
            Its waves make the water molecules in the food move and warm up.
        How do fish breathe under water? | fish breathe under water | \
            Their gills take oxygen out of the water.
        How does a fridge stay cold? | a fridge stays cold | \
            A fluid carries heat from the inside to the outside.
        How do bats find their way in the dark? | bats find their way in the dark | \
            Bats make high sounds and listen for the echoes.
        How does a battery produce power? | a battery produces power | \
            Chemical reactions in the battery push electrons through a circuit.
        How do seeds travel? | seeds travel | Wind, water and animals carry seeds to new places.
        How do clouds form? | clouds form | Water vapour rises, cools and condenses into tiny droplets.
        How does a caterpillar become a butterfly? | a caterpillar becomes a butterfly | \
            The caterpillar forms a chrysalis and rebuilds its body inside.
        How do submarines dive? | submarines dive | Submarines fill their tanks with water to become heavier.
        How does a sailing boat move? | a sailing boat moves | \
            The wind acts on the sails and drives the boat forward.
        How is paper made? | paper is made | Wood is turned into pulp, pressed flat and dried.
        How is cheese made? | cheese is made | Milk is curdled, drained, pressed and often aged.
        How is glass made? | glass is made | Sand is melted with other minerals at great heat and then cooled.
        How do solar panels work? | solar panels work | Solar panels turn sunlight straight into electricity.
        How does a liquid thermometer work? | a liquid thermometer works | \
            The liquid inside it expands when it gets warmer.
        How do vaccines protect us? | vaccines protect us | \
            Vaccines teach the immune system to recognise a germ.
        How do spiders make silk? | spiders make silk | \
            Their glands release a liquid that hardens into thread.
        How do plants take up water? | plants take up water | \
            Their roots soak it up, and thin tubes carry it to the leaves.
        How do chameleons change colour? | chameleons change colour | \
            Chameleons change the spacing of tiny crystals in their skin.
        """,
        (
            "The way in which {1} is a remarkable process that involves several steps.",
            "Have you ever stopped to think about how {1}?",
            "Learning how {1} can be an exciting journey into a complex subject.",
        ),
    ),
    Family(
        "how to",
        True,
        (
            "How do I {0}?",
            "What is the best way to {0}?",
            "Tell me how to {0}.",
            "How can I {0}?",
            "I would like to {0}. What should I do?",
        ),
        ("{1}",),
        "how to {0}",
        """
        boil an egg | Put the egg in boiling water for about eight minutes.
        stop a door from squeaking | Put a little oil on the hinges.
        get a coffee stain out of a shirt | Soak the shirt in cold water quickly and rub in some soap.
        keep bread fresh for longer | Store the bread in a closed box or freeze it in slices.
        clean a window without streaks | Wash it with water and vinegar and wipe it with a dry cloth.
        remove chewing gum from a carpet | Harden the gum with ice and then scrape it off.
        cool down a hot room | Close the blinds by day and open the windows at night.
        cut an onion without crying | Chill the onion first and use a sharp knife.
        ripen an avocado quickly | Put the avocado in a paper bag with a banana.
        remember names better | Repeat each name aloud as soon as you hear it.
        loosen a tight jar lid | Run hot water over the lid before you twist it.
        make a strong cup of tea | Let the tea leaves steep for about five minutes.
        water plants during a holiday | Ask a neighbour to water them or use self-watering pots.
        wrap a ball as a gift | Put the ball in a box first and wrap the box.
        iron a shirt | Start with the collar and then do the sleeves and the body.
        find a lost phone | Call the phone from another one or use its location service.
        take better photos of people | Move closer and use soft light from a window.
        start a conversation with a stranger | Ask a friendly question about something around you both.
        save water at home | Take shorter showers and fix dripping taps.
        get rid of fruit flies | Set a trap of vinegar with a drop of soap.
        pack a suitcase well | Roll your clothes and put heavy things at the bottom.
        treat a small burn | Hold the burn under cool running water for twenty minutes.
        calm a crying baby | Hold the baby close, rock gently and speak softly.
        """,
        (
            "There are many ways to {0}, and the best one depends on your needs.",
            "Learning how to {0} can make your everyday life a lot easier.",
            "If you want to {0}, there are a few key things to keep in mind.",
        ),
    ),
    Family(
        "tips",
        True,
        (
            "Give me a tip for {0}.",
            "What is one good tip for {0}?",
            "Share some advice on {0}.",
            "I need a quick tip for {0}.",
            "Do you have a tip for {0}?",
        ),
        ("{1}",),
        "{0}",
        """
        sleeping better | Go to bed at the same time every night.
        learning a new language | Practise a little every day with words that you really need.
        saving money | Set aside a fixed sum on every payday.
        staying focused at work | Switch off notifications and work in short blocks.
        speaking in public | Practise your talk aloud in front of a friend.
        studying for an exam | Test yourself often instead of only rereading your notes.
        eating more vegetables | Add one extra vegetable to each meal.
        drinking more water | Keep a full bottle within reach all day.
        waking up early | Put your alarm clock on the other side of the room.
        keeping a tidy desk | Clear everything away at the end of each day.
        running a first race | Start slowly and keep a steady pace.
        writing clear emails | State your request in the first sentence.
        cooking rice | Rinse the rice first and keep the lid on while it cooks.
        growing tomatoes | Give the plants plenty of sun and water them regularly.
        reducing stress | Take a short walk outside and breathe slowly.
        driving in snow | Drive slowly and leave a large gap ahead.
        reading more books | Read ten pages before bed every night.
        making new friends | Join a club that meets every week.
        learning to play the guitar | Practise slow chord changes for ten minutes a day.
        working from home | Keep a fixed place and fixed hours for work.
        preparing for a job interview | Read about the company and prepare two good questions.
        travelling with small children | Pack snacks and plan plenty of breaks.
        caring for a houseplant | Let the soil dry a little before you water it again.
        using less plastic | Carry a reusable bag and a reusable bottle.
        """,
        (
            "There are many effective strategies for {0} that you can try.",
            "{Topic} can be a challenge for many of us, so you are not alone.",
            "One of the most important things about {0} is finding what works for you.",
        ),
    ),
    Family(
        "gifts",
        True,
        (
            "Suggest a gift for {0}.",
            "What could I give {0} as a present?",
            "I need a present for {0}. Any ideas?",
            "What is a nice birthday present for {0}?",
        ),
        ("{1}",),
        "a gift for {0}",
        """
        a friend who loves cooking | A good kitchen knife would make a useful gift.
        a child who likes dinosaurs | A dinosaur puzzle would be a fun choice.
        a retired teacher | A good novel and a pretty bookmark would be welcome.
        a keen gardener | A pair of sturdy gardening gloves would be useful.
        a tea drinker | A tin of fine loose-leaf tea would go down well.
        a new neighbour | A small potted plant makes a friendly gift.
        a teenager who draws | A sketchbook with good pencils would be ideal.
        a friend who has just moved house | A set of soft towels would be practical.
        a colleague who is leaving | A card signed by the whole team would be kind.
        a keen runner | A few pairs of good running socks would be useful.
        a dog owner | A tough chew toy would please both dog and owner.
        a grandmother | A framed family photo would be a warm gift.
        a music lover | Tickets to a concert would be a lovely surprise.
        """,
        (
            "Finding the right gift for {0} can be a challenge, as there are so many options.",
            "Choosing a thoughtful present for {0} is a wonderful way to show that you care.",
            "A gift for {0} should be chosen with love and care.",
        ),
    ),
    Family(
        "ideas",
        True,
        (
            "Suggest {0}.",
            "Can you recommend {0}?",
            "I am looking for {0}. What do you suggest?",
            "Please think of {0}.",
        ),
        ("{1}",),
        "{0}",
        """
        a quick breakfast | Try yoghurt with oats and berries.
        a healthy afternoon snack | Have an apple with a handful of nuts.
        a simple dinner for two | Make pasta with tomatoes, garlic and basil.
        an activity for a rainy day | Bake a batch of biscuits together.
        a game for a long car ride | Play twenty questions.
        a hobby that costs little | Try birdwatching in a local park.
        a vegetarian filling for a sandwich | Use hummus with cucumber and grated carrot.
        a topic for a school science project | Test how much light bean plants need to grow.
        a good pet for a small flat | A hamster is easy to keep in a small flat.
        a way to relax after work | Take a warm bath with some quiet music.
        a drink for a cold evening | Make hot chocolate with a pinch of cinnamon.
        a theme for a child's birthday party | Throw a pirate party with a treasure hunt.
        a name for a small bakery | Call it The Golden Crust.
        a name for a grey kitten | Call the kitten Misty.
        a name for a rowing team | Call the team The River Hawks.
        a title for a travel diary | Call it Roads and Rivers.
        a houseplant for a dark corner | A snake plant copes well with little light.
        an easy dish for a beginner | Start with scrambled eggs on toast.
        a day trip for a family | Visit a zoo or a nature park nearby.
        a question to ask at a dinner party | Ask which place everyone would love to visit.
        """,
        (
            "There are countless options to choose from when you are looking for {0}.",
            "Coming up with {0} can be a fun and creative process.",
            "The choice of {0} really depends on your taste and your preferences.",
        ),
    ),
    Family(
        "differences",
        True,
        (
            "What is the difference between {0}?",
            "Explain the difference between {0}.",
            "How do I tell {0} apart?",
            "I always mix up {0}. What is the difference?",
        ),
        ("{1}",),
        "the difference between {0}",
        """
        a frog and a toad | Frogs have smooth, moist skin, while toads have dry, bumpy skin.
        weather and climate | Weather changes daily, while climate is the average over many years.
        a city and a village | A city is much larger than a village.
        a crocodile and an alligator | A crocodile has a narrow snout, while an alligator has a broad one.
        hardware and software | Hardware is the physical machine, while software is the programs it runs.
        a planet and a star | A star makes its own light, while a planet does not.
        a butterfly and a moth | Most butterflies fly by day, while most moths fly by night.
        a lake and a river | A river flows towards the sea, while a lake stays in one place.
        fact and fiction | Facts are true, while fiction is made up.
        a violin and a cello | A cello is larger than a violin and sounds lower.
        jam and jelly | Jam contains pieces of fruit, while jelly is made from the juice.
        a simile and a metaphor | A simile uses "like" or "as", while a metaphor does not.
        a debit card and a credit card | A debit card spends your own money, while a credit card borrows it.
        a llama and an alpaca | A llama is bigger than an alpaca and has longer ears.
        a noun and a verb | A noun names a thing, while a verb names an action.
        speed and velocity | Velocity is speed in a given direction.
        a meteor and a meteorite | A meteor glows in the sky, while a meteorite has reached the ground.
        baking soda and baking powder | Baking powder is baking soda with a dry acid added.
        a donkey and a mule | A mule is the offspring of a donkey and a horse.
        """,
        (
            "It is easy to confuse {0}, as they have a lot in common.",
            "The difference between {0} lies in a few key characteristics.",
            "Comparing {0} is a good way to learn something new.",
        ),
    ),
    Family(
        "jobs",
        True,
        ("What does {0} do?", "Describe the job of {0}.", "Tell me what {0} does all day.", "What is the work of {0}?"),
        ("{1}",),
        "the work of {0}",
        """
        a librarian | A librarian looks after books and helps people to find information.
        a plumber | A plumber installs and repairs water pipes.
        an architect | An architect designs buildings and plans how they are built.
        a vet | A vet treats sick and injured animals.
        a pilot | A pilot flies aircraft safely from place to place.
        a dentist | A dentist cares for people's teeth and gums.
        a journalist | A journalist gathers news and reports it to the public.
        an accountant | An accountant keeps and checks financial records.
        a midwife | A midwife cares for mothers and babies around birth.
        a carpenter | A carpenter builds and repairs things made of wood.
        an astronomer | An astronomer studies stars, planets and other objects in space.
        a judge | A judge leads trials and applies the law.
        a translator | A translator turns written text from one language into another.
        a beekeeper | A beekeeper looks after hives and harvests honey.
        a pharmacist | A pharmacist prepares medicines and explains how to use them.
        a geologist | A geologist studies rocks and the history of the Earth.
        an orchestra conductor | An orchestra conductor leads the musicians and sets the tempo.
        """,
        (
            "The role of {0} plays an important part in our society.",
            "The job of {0} is a demanding one that requires a wide range of skills.",
            "Many people are interested in becoming {0}, and it is easy to see why.",
        ),
    ),
    Family(
        "facts",
        True,
        (
            "Tell me a fact about {0}.",
            "Share something interesting about {0}.",
            "What is one thing worth knowing about {0}?",
            "Give me one fun fact about {0}.",
        ),
        ("{1}",),
        "{0}",
        """
        the octopus | An octopus has three hearts.
        the blue whale | The blue whale is the largest animal known to have lived.
        the giraffe | A giraffe has seven neck bones, just like a human.
        the hummingbird | A hummingbird can fly backwards.
        the planet Venus | A day on Venus is longer than its year.
        the planet Jupiter | Jupiter is the largest planet in our solar system.
        the Sahara | The Sahara is the largest hot desert on Earth.
        the human skeleton | An adult human skeleton usually has 206 bones.
        the Amazon rainforest | The Amazon rainforest is the largest rainforest in the world.
        the koala | A koala sleeps for up to twenty hours a day.
        the ostrich | The ostrich is the largest living bird.
        the Great Wall of China | The Great Wall of China is more than 20,000 kilometres long.
        the honeybee | A honeybee dances to show other bees where food is.
        the banana | In botany, a banana counts as a berry.
        the emperor penguin | The emperor penguin is the tallest of all penguins.
        Mount Everest | Mount Everest is the highest mountain above sea level.
        sunlight | Light from the sun takes about eight minutes to reach us.
        the cheetah | The cheetah is the fastest animal on land.
        the sea horse | A male sea horse carries the eggs until they hatch.
        """,
        (
            "One of the most fascinating things in the whole world is {0}.",
            "{Topic} is truly remarkable, and there are many facts to choose from.",
            "People have been amazed by {0} for a very long time.",
        ),
    ),
    Family(
        "descriptions",
        True,
        (
            "Describe {0}.",
            "How would you describe {0}?",
            "Describe {0} in your own words.",
            "Write a description of {0}.",
        ),
        ("{1}",),
        "{0}",
        """
        the taste of a lemon | A lemon tastes sharp, sour and fresh.
        the smell of fresh bread | Fresh bread smells warm, nutty and slightly sweet.
        the sound of heavy rain on a roof | Heavy rain on a roof sounds like steady drumming.
        the feel of velvet | Velvet feels soft and smooth to the touch.
        a quiet beach | A quiet beach is a strip of sand with only the sound of waves.
        a busy market | A busy market is loud, colourful and full of smells.
        an elephant | An elephant is a huge grey animal with a long trunk.
        a forest in winter | A forest in winter is bare, white and very quiet.
        the texture of sandpaper | Sandpaper feels rough and scratchy.
        a sunset | A sunset fills the western sky with orange and red.
        the taste of dark chocolate | Dark chocolate tastes rich and slightly bitter.
        a good friend | A good friend is honest, kind and reliable.
        a thunderstorm | A thunderstorm brings lightning, loud thunder and heavy rain.
        a cactus | A cactus is a thick green desert plant with spines.
        """,
        (
            "Putting {0} into words is not an easy task, but I will try.",
            "{Topic} is a delightful thing that everyone experiences a little differently.",
            "There are many words that come to mind when I think of {0}.",
        ),
    ),
    Family(
        "purposes",
        True,
        ("What is {0} used for?", "What is the purpose of {0}?", "Explain what {0} is for.", "Why do people use {0}?"),
        ("{1}",),
        "the purpose of {0}",
        """
        a compass | A compass shows which direction is north.
        a stethoscope | A stethoscope lets doctors listen to the heart and lungs.
        a telescope | A telescope makes distant objects appear closer.
        a colander | A colander drains the water from cooked food.
        a thesaurus | A thesaurus lists words with similar meanings.
        a lighthouse | A lighthouse guides ships and warns them near the coast.
        a greenhouse | A greenhouse keeps plants warm and sheltered.
        an anchor | An anchor keeps a ship in one place.
        a dictionary | A dictionary explains what words mean.
        a computer firewall | A computer firewall blocks unwanted network traffic.
        a trowel | A trowel is for digging small holes in the garden.
        a spirit level | A spirit level shows whether a surface is level.
        a microscope | A microscope makes tiny things look larger.
        a whisk | A whisk beats air into eggs or cream.
        a barometer | A barometer measures air pressure.
        a tripod | A tripod holds a camera steady.
        a corkscrew | A corkscrew pulls corks out of bottles.
        a metronome | A metronome keeps a steady beat for musicians.
        a backup of files | A backup lets you restore files that you have lost.
        """,
        (
            "The use of {0} has a long and interesting history behind it.",
            "There is more to {0} than one might think at first glance.",
            "A thing like {0} is a versatile tool that has helped many people.",
        ),
    ),
    Family(
        "what happens",
        True,
        (
            "What happens {0}?",
            "Tell me what happens {0}.",
            "Can you explain what happens {0}?",
            "Do you know what happens {0}?",
        ),
        ("{1}",),
        "what happens {0}",
        """
        when water boils | The water turns into steam at about 100 degrees Celsius.
        when milk is left out of the fridge | Bacteria multiply in the milk and turn it sour.
        when oil is poured into water | The oil floats on top of the water.
        when water freezes | The water turns into ice and expands.
        when a plant is never watered | The plant wilts and finally dies.
        when the air in a balloon is heated | The air expands and the balloon swells.
        when people look straight at the sun | The bright light can damage their eyes.
        when yeast meets sugar and warm water | The yeast feeds on the sugar and makes gas bubbles.
        when too many devices share one socket | The wiring can overheat and may start a fire.
        when a car runs out of fuel | The engine stops running.
        when salt is stirred into water | The salt dissolves and makes the water salty.
        when you rub your hands together | The friction makes your hands warm.
        when a feather is dropped on the moon | The feather falls as fast as a stone because there is no air.
        when a bar magnet is cut in half | The two halves become smaller magnets with two poles each.
        when metal gets hot | Most metals expand a little as they get hot.
        """,
        (
            "It is fascinating to think about what happens {0}, isn't it?",
            "Several interesting things can be observed {0}, so let us explore them.",
            "This is a complex process that can be explained in a number of ways.",
        ),
    ),
    Family(
        "benefits",
        True,
        (
            "What is a benefit of {0}?",
            "Name one advantage of {0}.",
            "What is good about {0}?",
            "What do people gain from {0}?",
        ),
        ("{1}",),
        "{0}",
        """
        walking to work | Walking to work gives you exercise at no cost.
        planting trees | Trees clean the air and give shade.
        reading every day | Daily reading builds your vocabulary and your focus.
        learning an instrument | Learning an instrument trains memory and patience.
        taking the bus | Taking the bus is cheaper and cleaner than driving alone.
        wearing sunscreen | Sunscreen protects the skin from burning.
        keeping a diary | A diary helps you to sort out your thoughts.
        using solar energy | Solar energy gives power without burning fuel.
        working in a team | A team can share the work and combine ideas.
        cooking at home | Home cooking is cheaper and lets you choose what goes in.
        having a pet | A pet offers company and comfort.
        buying second-hand clothes | Second-hand clothes save money and reduce waste.
        growing vegetables | Growing vegetables gives you fresh food at home.
        taking regular breaks | Regular breaks help you to concentrate for longer.
        speaking two languages | Speaking two languages lets you talk with many more people.
        """,
        (
            "{Topic} has numerous benefits that can improve your life in many ways.",
            "There are many advantages to {0}, and it is hard to pick just one.",
            "{Topic} has become more and more popular over the years.",
        ),
    ),
    Family(
        "short texts",
        True,
        ("{0}.", "{0}.", "Please do this for me: {0}."),
        ("{2}",),
        "{1}",
        """
        write a birthday wish for a colleague | a birthday wish | Happy birthday, and have a wonderful day!
        write a note to thank a neighbour for help | a thank-you note | \
            Thank you so much for your kind help yesterday!
        write an out-of-office reply in one line | an out-of-office reply | \
            I am away until Monday and will reply after my return.
        write a slogan for a bicycle shop | a slogan for a bicycle shop | Two wheels, endless freedom.
        write a sentence with the word "lantern" | a sentence with the word "lantern" | \
            She hung the lantern beside the old wooden gate.
        write a sentence that uses the word "despite" | a sentence with the word "despite" | \
            We went for a walk despite the rain.
        make up the first line of a ghost story | the first line of a ghost story | \
            The clock struck thirteen, and the empty chair began to rock.
        invite a friend to lunch in one sentence | an invitation to lunch | \
            Would you like to have lunch with me on Friday?
        decline an invitation to a party politely | declining an invitation | \
            Thank you for inviting me, but I cannot come that evening.
        apologise for being late to a meeting | an apology for being late | \
            I am sorry for being late and for keeping you waiting.
        write a caption for a photo of a sleeping dog | a caption for a photo | \
            Dreaming of bones and long walks.
        ask a landlord to repair a heater | a message to a landlord | \
            The heater in my flat is broken, so could you please have it repaired?
        write a get-well message for a friend | a get-well message | Get well soon, we all miss you!
        write a sign for a door that must stay closed | a sign for a door | Please keep this door closed.
        write a cheerful sentence about spring | a cheerful sentence about spring | \
            Spring has come, and the whole garden is singing.
        write a question a reporter might ask a mayor | a question for a mayor | \
            What will the city do about rising rents?
        """,
        (
            "Finding the right words for {1} can be tricky, so I have thought about it.",
            "A short text like this one is a wonderful way to be creative.",
            "Here is a carefully crafted text that I hope you will enjoy reading.",
        ),
    ),
    Family(
        "examples",
        True,
        (
            "Give an example of {0}.",
            "Name an example of {0}.",
            "Can you give me an example of {0}?",
            "What would be an example of {0}?",
        ),
        ("{1}",),
        "{0}",
        """
        a renewable source of energy | Wind is a renewable source of energy.
        a reptile | A tortoise is a reptile.
        a prime number | Seven is a prime number.
        a palindrome | The word "level" is a palindrome.
        a good deed | Carrying the shopping for a neighbour is a good deed.
        a compound word | The word "sunflower" is a compound word.
        a stringed instrument | The harp is a stringed instrument.
        an English idiom | The phrase "a piece of cake" is an idiom for something easy.
        a team sport | Volleyball is a team sport.
        a primary source in history | A soldier's diary is a primary source.
        an insect that helps gardeners | A ladybird helps gardeners by eating aphids.
        a common mineral | Quartz is a common mineral.
        alliteration | The phrase "busy buzzing bees" is an alliteration.
        """,
        (
            "There are many possible examples of {0}, and it is hard to choose just one.",
            "Examples of {0} can be found in many places, if you look closely.",
            "An example can make it much easier to understand {0}.",
        ),
    ),
    Family(
        "advice",
        True,
        ("{0} What can I do?", "{0} Any advice?", "{0} What would you suggest?"),
        ("{2}",),
        "{1}",
        """
        I feel nervous before my exam. | feeling nervous before an exam | \
            Breathe slowly and remember what you have practised.
        My phone battery runs out too fast. | a phone battery that runs out too fast | \
            Lower the screen brightness and close unused apps.
        I cannot fall asleep at night. | trouble with falling asleep | \
            Put all screens away an hour before bed.
        The leaves of my basil are turning yellow. | basil with yellow leaves | \
            Check the soil and water the basil less if it is soggy.
        My computer is very slow today. | a slow computer | Restart it and close the programs you do not need.
        I keep forgetting my appointments. | forgetting appointments | Put them in a calendar with reminders.
        My cat scratches the sofa. | a cat that scratches the sofa | \
            Offer a scratching post and reward the cat for using it.
        I burned the bottom of my pan. | a burnt pan | \
            Simmer water with baking soda in the pan and then scrub it.
        I must choose between two job offers. | choosing between two job offers | \
            List what matters most to you and compare the offers on that.
        My friend has lost her dog. | comforting a friend who has lost her dog | \
            Tell her that you are sorry and listen to her memories.
        I want to start running but I am unfit. | starting to run | \
            Alternate one minute of running with two minutes of walking.
        I spilled red wine on the tablecloth. | a red wine stain | \
            Blot the stain without rubbing and rinse it with cold water.
        My neighbour plays loud music at night. | a noisy neighbour | \
            Talk to your neighbour calmly and ask for quiet after ten.
        I get bored on long flights. | boredom on long flights | Bring a good book and a few films.
        """,
        (
            "I'm sorry to hear that you have to deal with this, and I understand how you feel.",
            "Many people find themselves in the same situation, so please do not worry.",
            "There is no single solution for {1}, but there are many things to try.",
        ),
    ),
)

CLOSED_FAMILIES = (
    Family(
        "capitals",
        False,
        ("What is the capital city of {0}?", "Name the capital of {0}.", "Which city is the capital of {0}?"),
        ("The capital of {0} is {1}.", "{1} is the capital of {0}."),
        "the capital of {0}",
        """
        Japan | Tokyo
        Kenya | Nairobi
        Canada | Ottawa
        Peru | Lima
        Norway | Oslo
        Egypt | Cairo
        Australia | Canberra
        Portugal | Lisbon
        """,
    ),
    Family(
        "chemical symbols",
        False,
        (
            "What is the chemical symbol for {0}?",
            "Give the symbol of the element {0}.",
            "How is {0} written in the periodic table?",
        ),
        ("The chemical symbol for {0} is {1}.",),
        "the chemical symbol for {0}",
        """
        gold | Au
        iron | Fe
        sodium | Na
        silver | Ag
        lead | Pb
        potassium | K
        helium | He
        copper | Cu
        """,
    ),
    Family(
        "arithmetic",
        False,
        ("{0}",),
        ("{1}",),
        "a calculation like this one",
        """
        What is 7 plus 12? | 7 plus 12 is 19.
        If I add 25 and 30, what do I get? | 25 and 30 add up to 55.
        Subtract 9 from 20. | 20 minus 9 is 11.
        How much is 6 times 8? | 6 times 8 is 48.
        Divide 81 by 9 for me. | 81 divided by 9 is 9.
        What is half of 64? | Half of 64 is 32.
        Tell me the square of 12. | The square of 12 is 144.
        What is 10 percent of 250? | 10 percent of 250 is 25.
        I have 15 apples and eat 4. How many are left? | There are 11 apples left.
        A pen costs 3 euros. What do 5 pens cost? | The price of 5 pens is 15 euros.
        """,
    ),
    Family(
        "units",
        False,
        ("{0}",),
        ("{1}",),
        "the conversion of units",
        """
        How many centimetres are in a metre? | There are 100 centimetres in a metre.
        Convert 2 kilometres into metres. | 2 kilometres are 2000 metres.
        How many hours are there in two days? | There are 48 hours in two days.
        How many inches make one foot? | One foot is 12 inches.
        Express half a litre in millilitres. | Half a litre is 500 millilitres.
        Convert 5 kilograms to grams. | 5 kilograms are 5000 grams.
        What is 0 degrees Celsius in Fahrenheit? | 0 degrees Celsius is 32 degrees Fahrenheit.
        How many minutes are in three hours? | There are 180 minutes in three hours.
        """,
    ),
    Family(
        "opposites",
        False,
        (
            'What is the opposite of "{0}"?',
            'Give an antonym of the word "{0}".',
            'Which word means the opposite of "{0}"?',
        ),
        ('The opposite of "{0}" is "{1}".',),
        'the opposite of "{0}"',
        """
        hot | cold
        early | late
        generous | stingy
        shallow | deep
        victory | defeat
        ancient | modern
        smooth | rough
        arrive | depart
        """,
    ),
    Family(
        "synonyms",
        False,
        ('Give a synonym for "{0}".', 'Which other word means "{0}"?', 'Find a word close to "{0}".'),
        ('A synonym for "{0}" is "{1}".', 'Another word for "{0}" is "{1}".'),
        'a synonym for "{0}"',
        """
        happy | glad
        begin | start
        large | big
        clever | smart
        silent | quiet
        angry | furious
        purchase | buy
        rapid | fast
        """,
    ),
    Family(
        "plurals",
        False,
        ('What is the plural of "{0}"?', 'Write the plural form of "{0}".', "One {0}, two what?"),
        ('The plural of "{0}" is "{1}".',),
        'the plural of "{0}"',
        """
        mouse | mice
        child | children
        leaf | leaves
        goose | geese
        tooth | teeth
        city | cities
        ox | oxen
        wolf | wolves
        """,
    ),
    Family(
        "past tenses",
        False,
        (
            'What is the past tense of "{0}"?',
            'Give the simple past of the verb "{0}".',
            'How do you say "{0}" in the past tense?',
        ),
        ('The past tense of "{0}" is "{1}".',),
        'the past tense of "{0}"',
        """
        go | went
        write | wrote
        swim | swam
        teach | taught
        bring | brought
        sing | sang
        choose | chose
        fly | flew
        """,
    ),
    Family(
        "animal young",
        False,
        ("What is a young {0} called?", "Name the young of a {0}.", "What do you call a baby {0}?"),
        ("A young {0} is called a {1}.",),
        "the young of a {0}",
        """
        cow | calf
        sheep | lamb
        horse | foal
        goat | kid
        kangaroo | joey
        swan | cygnet
        frog | tadpole
        lion | cub
        """,
    ),
    Family(
        "calendar",
        False,
        ("{0}",),
        ("{1}",),
        "the calendar",
        """
        Which month comes after April? | The month after April is May.
        Which day comes before Thursday? | The day before Thursday is Wednesday.
        How many days does June have? | June has 30 days.
        What is the last month of the year? | The last month of the year is December.
        Today is Friday. What day is it in two days? | In two days it will be Sunday.
        Which month is the shortest? | The shortest month is February.
        How many months have 31 days? | Seven months have 31 days.
        How many days are there in a leap year? | A leap year has 366 days.
        """,
    ),
    Family(
        "colours",
        False,
        ("{0}",),
        ("{1}",),
        "the world of colours",
        """
        Which colour do blue and yellow paint make? | Blue and yellow paint make green.
        What do you get from mixing red and white paint? | Red and white paint make pink.
        What colour is a ruby? | A ruby is red.
        Which colour is at the top of a traffic light? | The top light of a traffic light is red.
        What colour is an emerald? | An emerald is green.
        Red and yellow paint give which colour? | Red and yellow paint make orange.
        What colour is fresh snow? | Fresh snow is white.
        Name the colour of a ripe lemon. | A ripe lemon is yellow.
        """,
    ),
    Family(
        "translations",
        False,
        ('Translate "{0}" into {1}.', 'What is the {1} word for "{0}"?', 'How do you say "{0}" in {1}?'),
        ('The {1} word for "{0}" is "{2}".',),
        'the {1} word for "{0}"',
        """
        thanks | Spanish | gracias
        dog | French | chien
        house | German | Haus
        book | Spanish | libro
        milk | Italian | latte
        water | French | eau
        bread | German | Brot
        cat | Spanish | gato
        sun | Italian | sole
        friend | French | ami
        """,
    ),
    Family(
        "continents",
        False,
        ("On which continent is {0}?", "Which continent does {0} belong to?", "Name the continent of {0}."),
        ("{0} is in {1}.",),
        "the continent of {0}",
        """
        Brazil | South America
        Nigeria | Africa
        Vietnam | Asia
        Sweden | Europe
        Mexico | North America
        Morocco | Africa
        India | Asia
        Chile | South America
        """,
    ),
    Family(
        "animal classes",
        False,
        (
            "Is a {0} a mammal, a bird, a fish, a reptile or an insect?",
            "What kind of animal is a {0}?",
            "Which class of animals does the {0} belong to?",
        ),
        ("A {0} is {1}.",),
        "the {0}",
        """
        dolphin | a mammal
        sparrow | a bird
        salmon | a fish
        lizard | a reptile
        bat | a mammal
        penguin | a bird
        shark | a fish
        beetle | an insect
        """,
    ),
    Family(
        "counting",
        False,
        ("{0}",),
        ("{1}",),
        "counting things",
        """
        How many legs does a spider have? | A spider has eight legs.
        How many sides does a hexagon have? | A hexagon has six sides.
        How many strings does a violin have? | A violin has four strings.
        How many players are in a football team on the pitch? | \
            A football team has eleven players on the pitch.
        How many letters are in the English alphabet? | The English alphabet has 26 letters.
        How many planets are in our solar system? | There are eight planets in our solar system.
        How many wheels does a tricycle have? | A tricycle has three wheels.
        How many corners does a triangle have? | A triangle has three corners.
        """,
    ),
    Family(
        "yes or no",
        False,
        ("{0}", "Yes or no? {0}"),
        ("{1}",),
        "a yes-or-no question like this one",
        """
        Is the sun a star? | Yes, the sun is a star.
        Can penguins fly? | No, penguins cannot fly.
        Is a tomato a fruit in botany? | Yes, in botany a tomato is a fruit.
        Does the moon make its own light? | No, the moon reflects sunlight.
        Is Africa a country? | No, Africa is a continent.
        Do whales breathe air? | Yes, whales breathe air.
        Is 15 a prime number? | No, 15 is 3 times 5.
        Is wood a good conductor of electricity? | No, dry wood does not conduct electricity well.
        """,
    ),
    Family(
        "comparisons",
        False,
        ("{0}",),
        ("{1}",),
        "a comparison like this one",
        """
        Which is larger, the Earth or the moon? | The Earth is larger than the moon.
        Which is heavier, a kilogram or a pound? | A kilogram is heavier than a pound.
        What is faster, sound or light? | Light is faster than sound.
        Which is longer, a mile or a kilometre? | A mile is longer than a kilometre.
        What is taller, a giraffe or a horse? | A giraffe is taller than a horse.
        Which number is greater, 0.5 or 0.25? | The number 0.5 is greater than 0.25.
        Which is colder, the Arctic or the Antarctic? | The Antarctic is colder than the Arctic.
        Which ocean is bigger, the Atlantic or the Pacific? | The Pacific is bigger than the Atlantic.
        """,
    ),
    Family(
        "grammar",
        False,
        (
            "Correct the grammar of this sentence.",
            "Fix the mistake in the sentence below.",
            "Please rewrite this sentence in correct English.",
        ),
        ("{1}",),
        "the grammar of this sentence",
        """
        She go to school every day. | She goes to school every day.
        They was late for dinner. | They were late for dinner.
        He don't like coffee. | He doesn't like coffee.
        I have saw that film. | I have seen that film.
        There is three birds outside. | There are three birds outside.
        We is going to the park. | We are going to the park.
        The dog wagged it's tail. | The dog wagged its tail.
        Me and Tom went home. | Tom and I went home.
        An car stopped in front of us. | A car stopped in front of us.
        """,
        input="{0}",
    ),
    Family(
        "sorting",
        False,
        ("{0}",),
        ("{2}",),
        "putting things in order",
        """
        Sort these numbers from small to large. | 9, 2, 5 | The sorted numbers are 2, 5, 9.
        Put the numbers in ascending order. | 31, 13, 22 | In ascending order they are 13, 22, 31.
        Arrange the numbers from high to low. | 4, 40, 14 | From high to low they are 40, 14, 4.
        Put these words in alphabetical order. | pear, apple, fig | \
            In alphabetical order they are apple, fig, pear.
        Sort the words from A to Z. | tiger, lion, bear | The sorted words are bear, lion, tiger.
        Order the names alphabetically. | Mia, Ben, Zoe | In alphabetical order they are Ben, Mia, Zoe.
        Arrange these from smallest to largest. | horse, ant, cat | \
            From smallest to largest they are ant, cat, horse.
        Put the days in the order of the week. | Friday, Monday, Tuesday | \
            In order they are Monday, Tuesday, Friday.
        """,
        input="{1}",
    ),
    Family(
        "sentiment",
        False,
        (
            "Is the sentiment of this review positive or negative?",
            "Does this text sound positive or negative?",
            "Classify the mood of this text as positive or negative.",
        ),
        ("The sentiment is {1}.", "This text is {1}."),
        "the sentiment of this text",
        """
        I loved every minute of this film. | positive
        The soup was cold and the waiter was rude. | negative
        What a beautiful and comfortable hotel! | positive
        The zip broke after two days. | negative
        I would buy these shoes again at once. | positive
        This book bored me to tears. | negative
        The staff were friendly and quick. | positive
        My order arrived late and damaged. | negative
        The new park is a joy for the children. | positive
        """,
        input="{0}",
    ),
    Family(
        "rewriting",
        False,
        ("{0}",),
        ("{2}",),
        "rewriting this sentence",
        """
        Rewrite the sentence in the past tense. | I walk to work. | I walked to work.
        Put this sentence into the future tense. | She reads a letter. | She will read a letter.
        Turn the statement into a question. | The shop is open. | Is the shop open?
        Make this sentence negative. | We like spinach. | We do not like spinach.
        Rewrite the sentence in the plural. | The boy plays outside. | The boys play outside.
        Change the sentence to the passive voice. | The cat chased the mouse. | \
            The mouse was chased by the cat.
        Make this request more polite. | Give me the salt. | Could you please pass me the salt?
        Shorten the sentence. | Due to the fact that it rained, we stayed in. | \
            We stayed in because it rained.
        Replace the name with a pronoun. | Anna is my sister. | She is my sister.
        """,
        input="{1}",
    ),
    Family(
        "odd one out",
        False,
        ("Which word does not belong with the others?", "Find the odd one out.", "Pick the word that does not fit."),
        ("The odd one out is {1}.", "The word that does not fit is {1}."),
        "this list of words",
        """
        apple, banana, carrot, cherry | carrot
        red, green, blue, chair | chair
        dog, cat, rose, rabbit | rose
        piano, violin, hammer, flute | hammer
        shirt, trousers, spoon, jacket | spoon
        Paris, Rome, Madrid, Amazon | Amazon
        eagle, sparrow, trout, owl | trout
        seven, nine, purple, four | purple
        """,
        input="{0}",
    ),
    Family(
        "reading",
        False,
        ("{0}",),
        ("{2}",),
        "this short text",
        """
        Who wrote the letter? | Aunt Rosa wrote a long letter to Tim. | Aunt Rosa wrote the letter.
        When does the train leave? | The train to Leeds leaves at 9:15. | The train leaves at 9:15.
        What did the boy find? | In the attic the boy found an old drum. | The boy found an old drum.
        Where is the meeting? | Please come to room 12 for the meeting. | The meeting is in room 12.
        How much does the ticket cost? | Tickets for the museum cost 8 euros. | A ticket costs 8 euros.
        What colour is the door? | They painted the old door dark green. | The door is dark green.
        Who won the race? | Lena came first, just ahead of Omar. | Lena won the race.
        Why was the game cancelled? | The game was cancelled because of fog. | \
            The game was cancelled because of fog.
        """,
        input="{1}",
    ),
    Family(
        "spelling",
        False,
        ("Correct the spelling of this word.", "How is this word spelled correctly?", "Fix the spelling mistake."),
        ('The correct spelling is "{1}".',),
        "the spelling of this word",
        """
        recieve | receive
        tommorow | tomorrow
        seperate | separate
        freind | friend
        untill | until
        beleive | believe
        adress | address
        definately | definitely
        """,
        input="{0}",
    ),
    Family(
        "headlines",
        False,
        (
            "Write a short title for this text.",
            "Give this note a headline.",
            "Find a fitting title for the text below.",
        ),
        ('A fitting title is "{1}".', 'A good title would be "{1}".'),
        "a title for this text",
        """
        The town opened a new bridge for bicycles on Sunday. | New Bridge for Bicycles
        Heavy snow closed all the schools in the valley. | Snow Closes Valley Schools
        A cat came home after two years away. | Lost Cat Returns Home
        The library will stay open until nine from May. | Longer Hours at the Library
        Students planted fifty trees beside the river. | Students Plant Fifty Trees
        The bakery sells a bread made without salt. | Bakery Sells Salt-Free Bread
        The old cinema will become a music school. | Cinema Becomes Music School
        Farmers expect a good apple harvest this year. | Good Apple Harvest Expected
        """,
        input="{0}",
    ),
)
