"""What the painter can show: things and people with their art, sizes, homes and words.

    THINGS["fox"].words        # ("fox", "vixen"): the names that say it exactly
    THINGS["fox"].near         # words for which it is the nearest that can be shown

A row of a table is `name | art | traits | synonyms | near words`; every column but the first may be
empty. Art is a sprite ("noto:elephant", by default the name in the kind's own set), "drawn:" and a
table of drawings.py, "world:" and an animal of the storyworld, or "person:" and a row of people.py.
Traits are a size (SIZES; a kind has its own), the place where it is at home, and:

    head     the art is a head: a body is drawn below it     flies   may be in the air
    swims    is in the water where there is water            air     is always in the air
    carried  small enough to be held and given               ridden, seat  can be ridden, sat in
    plain    its colours are its name: never recoloured

To add a thing, add a row. Nothing is here that a children's book would not show.
"""

from __future__ import annotations

from dataclasses import dataclass, field

SIZES = {
    "tiny": 0.5,
    "small": 0.68,
    "middle": 0.9,
    "tall": 1.0,
    "large": 1.2,
    "huge": 1.45,
}  # of a hero's height

ANIMALS = """
fox              | world:fox        | forest         | vixen
rabbit           | world:rabbit     | small meadow   | bunny, hare, bunny rabbit
bear             | world:bear       | forest         | bear cub, grizzly
cat              | world:cat        | small living room | kitty, pussycat, tabby, tomcat
mouse            | world:mouse      | tiny kitchen   | mice | vole, shrew, gerbil
frog             | world:frog       | small lake     | froggy, toad, tadpole | newt
owl              | world:owl        | small forest flies | owlet
turtle           | world:turtle     | small beach swims | tortoise, sea turtle, terrapin
dog              |                  | living room    | hound, doggy, doggie | jackal, coyote
puppy            | noto:dog-face    | head small garden | pup, little dog
kitten           | noto:cat-face    | head small garden | little cat
poodle           |                  | city           |  | lapdog
black cat        |                  | small street   |  | panther
monkey           |                  | jungle         | ape, little monkey | baboon, lemur
gorilla          |                  | large jungle
orangutan        |                  | jungle         | orang-utan | chimpanzee, chimp
wolf             |                  | head forest    | wolves, wolf cub | werewolf
raccoon          |                  | forest         | racoon
lion             |                  | head large meadow | lion cub | lioness
tiger            |                  | large jungle   | tiger cub, tigress
leopard          |                  | large jungle   | cheetah | jaguar, lynx, puma
horse            |                  | large farm ridden | pony, mare, stallion | foal, colt, steed
unicorn          |                  | head large meadow
zebra            |                  | large meadow ridden
donkey           |                  | farm ridden    | mule, ass
deer |  | large forest | stag, fawn, doe, antelope, gazelle | springbok, impala, elk
moose            |                  | head large forest
reindeer         | drawn:reindeer   | large snow ridden
bison            |                  | large meadow   |  | yak
cow              |                  | large farm     | cattle | heifer
calf             | noto:cow-face    | head farm
ox               |                  | large farm ridden | bull, oxen
buffalo          | noto:water-buffalo | large river    | water buffalo
pig              |                  | farm           | hog, sow
piglet           | noto:pig-face    | head small farm | little pig
boar             |                  | head forest    | wild boar, warthog
sheep            | noto:ewe         | farm           | lamb, ewe, ram
goat             |                  | farm           | billy goat, kid goat, nanny goat
camel            |                  | large desert ridden |  | dromedary
llama            |                  | large mountain ridden | alpaca
giraffe          |                  | huge meadow
elephant         |                  | huge meadow ridden | baby elephant
mammoth          |                  | huge snow      | woolly mammoth
rhinoceros       |                  | huge meadow    | rhino
hippopotamus     |                  | large river    | hippo
rat              |                  | small street
hamster          |                  | head small bedroom |  | guinea pig
squirrel         | noto:chipmunk    | small forest   | chipmunk
beaver           |                  | small river    |  | groundhog, marmot
hedgehog         |                  | small garden   |  | porcupine
bat              |                  | small cave flies
polar bear       |                  | head large snow | ice bear
koala            |                  | head forest    | koala bear
panda            |                  | head large jungle | panda bear
sloth            |                  | jungle
otter            |                  | small river    |  | weasel, ferret, stoat
skunk            |                  | small forest
kangaroo         |                  | large desert   | joey | wallaby
badger           |                  | forest         |  | mole, anteater
hyena            | drawn:hyena      | meadow
crocodile        |                  | large river    | alligator, croc
lizard           |                  | small desert   | gecko, chameleon, iguana | salamander
snake            |                  | jungle         | serpent, python, cobra | viper
penguin          |                  | snow           |  | puffin
dinosaur         | noto:sauropod    | huge volcano ridden | dino, brontosaurus | diplodocus
tyrannosaurus    | noto:t-rex       | huge volcano   | t-rex, tyrannosaurus rex | raptor
snail            |                  | tiny garden    |  | slug
caterpillar      | noto:bug         | tiny garden    |  | grub
ant              |                  | tiny garden    |  | termite
beetle           |                  | tiny forest    | bug
ladybug          | noto:lady-beetle | tiny garden    | ladybird
cricket          |                  | tiny meadow    | grasshopper | locust
spider           |                  | tiny cave      |  | tarantula
scorpion         |                  | tiny desert
worm             |                  | tiny garden    | earthworm
crab             |                  | small beach    | hermit crab
"""

BIRDS = """
bird |  | small garden flies | little bird, songbird, birdie | sparrow, robin, wren
crow             | noto:black-bird  | small farm flies | raven, blackbird | magpie, starling
dove             |                  | small sky flies | pigeon | peace dove
seagull          | drawn:seagull    | small beach flies | gull | albatross
eagle            |                  | mountain flies | hawk, falcon | vulture, hornbill
parrot           |                  | small jungle flies | macaw | toucan, budgie
hen              | noto:chicken     | head small farm | chicken
rooster          |                  | small farm     | cock, cockerel
chick            | noto:baby-chick  | tiny farm      | baby chick, duckling
hatchling        | noto:hatching-chick | tiny farm      | hatching chick
duck             |                  | small lake swims | mallard
goose            |                  | farm           | geese
turkey           |                  | farm
swan             |                  | lake swims     | cygnet
flamingo         |                  | large lake
crane            | drawn:crane      | large lake flies | heron, stork | egret, ibis
peacock          |                  | large garden   | peahen
ostrich          | drawn:ostrich    | large desert ridden | emu
dodo             |                  | island
phoenix          |                  | large volcano flies | firebird
"""

SEA = """
fish             |                  | small sea swims | little fish | trout, salmon, sardine
goldfish         | noto:tropical-fish | small sea swims | tropical fish | clownfish
pufferfish       | noto:blowfish    | small sea swims | blowfish
shark            |                  | large sea swims |  | swordfish
whale            | noto:spouting-whale | huge sea swims ridden | blue whale
dolphin          |                  | large sea swims ridden | porpoise
orca             |                  | large sea swims | killer whale
seal             |                  | beach swims    | sea lion | walrus
octopus          |                  | sea swims
squid            |                  | sea swims      |  | cuttlefish
jellyfish        |                  | sea swims
lobster          |                  | small sea swims | crayfish
shrimp           |                  | tiny sea swims | prawn
mermaid          | fluent:woman-merpeople | sea swims
sea horse        | drawn:seahorse   | small sea swims | seahorse
starfish         | drawn:starfish   | tiny sea
"""

INSECTS = """
butterfly        |                  | tiny meadow air |  | moth
bee | noto:honeybee | tiny meadow air | honeybee, bumblebee, bumble bee | wasp, hornet
fly              |                  | tiny kitchen air | housefly | gnat
mosquito         |                  | tiny lake air
dragonfly        | drawn:dragonfly  | tiny lake air  |  | damselfly
firefly          | drawn:firefly    | tiny forest air | glow-worm, lightning bug
"""

FANTASY = """
dragon           |                  | huge castle ridden flies | baby dragon | wyvern
ghost            | fluent:ghost     | castle         | phantom | spirit
monster          | fluent:ogre      | head cave      | ogre, beast | demon, gremlin
alien            | fluent:alien     | head space     | martian, extraterrestrial
robot            | fluent:robot     | head city      | android
troll            | noto:troll       | large mountain
yeti             | noto:hairy-creature | large snow     | bigfoot
clown            | fluent:clown-face | head fair      | jester | fool
fairy            | fluent:person-fairy | small forest air | pixie, tooth fairy | sprite, nymph
genie            | noto:genie       | desert         | djinn
scarecrow        | drawn:scarecrow  | large farm
snowman          |                  | large snow
gingerbread man  | drawn:gingerbread | small kitchen  | gingerbread boy
"""

PEOPLE = """
boy              |                  | small | schoolboy, little boy | lad, nephew, child, kid, son
girl |  | small | schoolgirl, little girl | lass, niece, daughter
man              |                  |                | gentleman | stranger, guy
woman            |                  |                | lady | widow, dame
baby             |                  | tiny bedroom   | newborn | infant
toddler          |                  | tiny           | little child
mother |  | living room | mom, mum, mommy, mummy, mama, mam | wife, aunt, auntie
father           |                  | living room    | dad, daddy, papa | husband, uncle
grandmother      |                  | living room    | grandma, granny, old woman, old lady, nana
grandfather      |                  | living room    | grandpa, old man, granddad | elder, hermit
brother          |                  | small          | big brother | cousin
sister           |                  | small          | big sister | goldilocks, cinderella
king             |                  | castle         | emperor | sultan, chief
queen            |                  | castle         | empress
prince           |                  | castle
princess         |                  | castle
knight           |                  | castle         |  | warrior
guard            |                  | castle         |  | soldier
witch            |                  | forest         |  | sorceress
wizard           |                  | castle         | magician, sorcerer | mage
pirate           |                  | sea            | buccaneer
sailor           |                  | sea            |  | captain, fisherman
elf              |                  | small forest   |  | gnome, goblin, leprechaun
dwarf            |                  | small cave     | dwarves | hobbit
vampire          |                  | castle         | dracula
superhero        |                  | city           | super hero
angel            |                  | sky            |  | cherub
santa claus      |                  | snow           | santa, father christmas
astronaut        |                  | space          | spaceman, cosmonaut
doctor           |                  | hospital       |  | vet, dentist
nurse            |                  | hospital
teacher          |                  | school         | schoolteacher | professor
farmer           |                  | farm           |  | shepherd, peasant
cook             |                  | kitchen        | chef, baker | waiter
police officer   |                  | city           | policeman, police, policewoman | cop
firefighter      |                  | city           | fireman
builder |  | city | construction worker | carpenter, mechanic, worker
gardener         |                  | garden
postman          |                  | street         | mailman, mail carrier | messenger
pilot            |                  | sky            |  | driver
scientist        |                  | school         | inventor
artist           |                  | living room    | painter
singer           |                  | stage          |  | musician
dancer           |                  | stage          | ballerina, ballet dancer
detective        |                  | street         |  | spy
ninja            |                  | mountain
cowboy           |                  | desert         |  | sheriff
explorer         |                  | jungle         | adventurer | traveller, traveler, hiker
hunter           |                  | forest         | huntsman | woodcutter, lumberjack
shopkeeper |  | market | merchant, trader, seller | tailor, shoemaker, cobbler, barber
thief            |                  | street         | robber, burglar | bandit
bride            |                  | garden
"""

PLANTS = """
tree             | noto:deciduous-tree | huge forest    | oak, apple tree | bush, elm
pine tree        | noto:evergreen-tree | huge forest    | fir tree, pine | spruce
palm tree        |                  | huge beach     | coconut tree
bare tree        | noto:leafless-tree | huge forest    | dead tree
christmas tree   |                  | huge living room
cactus           |                  | large desert
flower           | noto:tulip       | garden carried | tulip | bloom
rose             |                  | garden carried | red rose
sunflower        |                  | garden carried
daisy            | noto:blossom     | small meadow carried |  | marigold, buttercup
bunch of flowers | noto:bouquet     | small garden carried | bouquet, flowers
cherry blossom   |                  | small garden   | blossom
water lily       | noto:lotus       | small lake     | lotus, lily pad
seedling         |                  | small garden   | sprout, young plant | seed
potted plant     |                  | small living room | plant, houseplant
clover           | noto:four-leaf-clover | small meadow carried | four-leaf clover, shamrock
leaf             | noto:maple-leaf  | small forest carried | maple leaf, leaves
wheat | noto:sheaf-of-rice | small farm carried | corn stalk, rice plant | barley, straw, oats
mushroom         |                  | small forest carried | toadstool
vine             | drawn:beanstalk  | huge garden    | beanstalk | ivy
"""

FOOD = """
apple            | noto:red-apple   |                | red apple | fruit
green apple
pear             |                  |                |  | quince
orange           | noto:tangerine   |                | tangerine | mandarin
lemon
banana
grapes           |                  |                | grape, bunch of grapes
watermelon
melon
pineapple
mango            |                  |                |  | papaya
peach            |                  |                |  | apricot, plum
cherries         |                  |                | cherry
strawberry       |                  |                |  | raspberry
blueberries      |                  |                | blueberry, berries, berry | blackberry
coconut
tomato
carrot           |                  |                |  | radish, parsnip
potato           |                  |                |  | yam, sweet potato
corn             | noto:ear-of-corn |                | ear of corn, maize
pumpkin          | drawn:pumpkin    |                |  | squash
jack-o-lantern   |                  |                | halloween pumpkin
cucumber         |                  |                |  | zucchini
cabbage          | noto:leafy-green |                | lettuce | spinach, kale
broccoli         |                  |                |  | cauliflower
pepper           | noto:hot-pepper  |                | chilli, chili | paprika
onion            |                  |                |  | garlic, leek
turnip           | noto:root-vegetable |                | beet
peas             | noto:pea-pod     |                | pea, pea pod
beans            |                  |                | bean, magic beans
nut              | noto:chestnut    |                | chestnut, nuts, hazelnut | acorn
peanut           | noto:peanuts     |                | peanuts
bread            |                  |                | loaf | dough, toast
baguette         | noto:baguette-bread
croissant        |                  |                |  | pastry
pretzel
pancakes         |                  |                | pancake
waffle
cheese           | noto:cheese-wedge
meat             | noto:meat-on-bone |                |  | roast, ham
chicken leg      | noto:poultry-leg |                | drumstick
egg
fried egg        | noto:cooking     |                |  | omelette, breakfast
hamburger        |                  |                | burger
fries            | noto:french-fries |                | french fries, chips
pizza
hot dog          |                  |                | sausage
sandwich         |                  |                |  | lunch
popcorn
butter
soup             | noto:pot-of-food |                | stew, porridge, pot of soup | supper, dinner
bowl             | noto:bowl-with-spoon
salad            | noto:green-salad
rice             | noto:cooked-rice |                | bowl of rice
noodles          | noto:steaming-bowl |                |  | ramen
spaghetti        |                  |                | pasta | macaroni
ice cream        | noto:soft-ice-cream |                | ice-cream, ice cream cone
doughnut         |                  |                | donut
cookie           |                  |                | biscuit | cracker, snack
cake             | noto:birthday-cake |                | birthday cake
slice of cake    | noto:shortcake   |                | piece of cake
cupcake          |                  |                | muffin
pie              |                  |                |  | tart
chocolate        | noto:chocolate-bar |                | chocolate bar
candy            |                  |                | sweets, sweet | toffee
lollipop
honey            | noto:honey-pot   |                | honey pot, pot of honey, jar of honey
milk             | noto:glass-of-milk |                | glass of milk
juice            | noto:beverage-box |                |  | drink
lemonade         | noto:cup-with-straw |                |  | soda
tea | noto:hot-beverage |  | cup of tea, cocoa, coffee, hot chocolate | cup, mug
teapot           |                  |                |  | kettle
"""

OBJECTS = """
ball             | noto:soccer-ball |                | football, soccer ball
basketball
baseball
tennis racket    | noto:tennis      |                | racket
baseball bat     | drawn:bat        |                | cricket bat | club
kite             | noto:kite        | air
balloon          |                  | air            | balloons
yo-yo
teddy bear       |                  | bedroom        | teddy | toy, stuffed animal
doll             | drawn:doll       | bedroom        | rag doll | puppet
blocks           | drawn:blocks     | bedroom        | building blocks | bricks
puzzle           | noto:puzzle-piece | bedroom        | jigsaw, puzzle piece
dice             | noto:game-die
toy robot        | drawn:toyrobot   | bedroom
video game
crystal ball
magic wand       |                  |                | wand
present          | noto:wrapped-gift |                | gift | parcel
party hat        | drawn:partyhat
trophy           |                  |                |  | prize
medal            | drawn:medal
crown            |                  | castle         |  | tiara
ring             |                  |                | diamond ring | bracelet
jewel            | noto:gem-stone   | cave           | diamond, gem | crystal, ruby, emerald
necklace         | drawn:necklace   |                | beads | pendant
hat              | noto:womans-hat  |                | sun hat | bonnet
top hat          |                  |                | magic hat
cap              | noto:billed-cap  |                | baseball cap
scarf            |                  |                |  | shawl
gloves           |                  |                | glove, mittens, mitten
coat             |                  |                | jacket | cloak
shirt            | noto:t-shirt     |                | t-shirt | sweater, jumper
dress            |                  |                |  | skirt, gown
trousers         | noto:jeans       |                | jeans, pants
socks            |                  |                | sock | stocking
shoes            | noto:running-shoe |                | shoe, sneakers | slipper, sandal
boots            | noto:womans-boot |                | boot
ballet shoes
glasses          |                  |                | spectacles | goggles
sunglasses       |                  | beach
bag              | noto:handbag     |                | handbag | purse, wallet
backpack         |                  | school         | schoolbag, rucksack | satchel, sack
suitcase         | noto:luggage     |                | luggage
umbrella         | drawn:umbrella   |                |  | parasol
fan              | noto:folding-hand-fan
mirror           |                  | bedroom        | magic mirror
comb             | drawn:comb       |                | hairbrush
toothbrush
soap             |                  |                |  | sponge
bubbles          |                  | air            | soap bubbles, bubble
bell
drum             |                  |                | drums | tambourine
guitar           |                  |                |  | banjo, lute
violin           |                  |                | fiddle | cello
trumpet          |                  |                | horn | bugle
flute            |                  |                | pipe | recorder, whistle
harp             |                  |                |  | lyre
accordion
saxophone
maracas          |                  |                |  | rattle
microphone       |                  | stage
radio
telephone        |                  |                | phone
mobile phone     |                  |                | cell phone, smartphone
computer         | noto:desktop-computer |                | desktop computer
laptop           |                  |                |  | tablet
television       |                  | living room    | tv
camera
telescope        |                  |                |  | binoculars
microscope       |                  | school
magnifying glass | noto:magnifying-glass-tilted-left |                |  | lens
candle           |                  |                | candles
lamp             | noto:diya-lamp   |                | magic lamp, oil lamp
lantern          | world:lantern
light bulb       |                  |                | lightbulb
flashlight       |                  |                | torch
book             | noto:closed-book |                | storybook | diary
open book        |                  | school
books            |                  | school         | pile of books, stack of books
scroll           |                  | castle         |  | parchment
newspaper        |                  |                |  | magazine
letter           | noto:envelope    |                | envelope | postcard, invitation, mail
love letter      |                  |                | valentine
map              | noto:world-map   |                | treasure map | chart
globe            | noto:globe-showing-europe-africa | school
compass
pencil           |                  | school         |  | pen
crayon           |                  | school         | crayons
paintbrush       |                  |                | brush
paints           | noto:artist-palette |                | paint box, palette | paint
picture          | noto:framed-picture |                | painting | photograph, portrait, photo
scissors
ruler            | noto:straight-ruler | school
calendar
clock            | noto:mantelpiece-clock
alarm clock      |                  | bedroom
watch            |                  |                | wristwatch
hourglass        | noto:hourglass-not-done
key              |                  |                | golden key
lock             | noto:locked      |                | padlock
door             |                  | large heavy    |  | gate
window           |                  | large heavy
hammer           |                  |                |  | mallet
saw              | noto:carpentry-saw
axe              |                  | forest         | ax | hatchet
shovel           |                  | garden         | spade | rake, hoe
ladder           |                  | large heavy    |  | stairs
wrench           |                  |                | spanner | screwdriver, tool
toolbox          |                  |                | tools
nail             | drawn:nail       |                | nails
wheel            |                  |                |  | tyre, tire
magnet
gear             |                  |                | cog | engine, machine part
rope             | drawn:rope       |                |  | string, cord
ball of wool     | noto:yarn        |                | wool, yarn
thread           |                  |                |  | needle
net              | drawn:net        |                | butterfly net
spider web       |                  | cave           | cobweb, spiderweb, web
fishing rod      | noto:fishing-pole | lake           | fishing pole
basket           |                  | seat           |  | cradle
bucket           |                  |                | pail | tub
broom            |                  | ridden         | broomstick | mop
watering can     | drawn:wateringcan | garden
pot              | drawn:pot        |                | cooking pot | cauldron
pan              | noto:shallow-pan-of-food |                | frying pan
plate            | noto:fork-and-knife-with-plate |                | dish | tray, meal
spoon            |                  | kitchen        |  | ladle
fork             | noto:fork-and-knife | kitchen
jar              |                  | kitchen        | glass jar
vase             | noto:amphora     |                |  | jug, urn
bottle           | noto:baby-bottle |                | baby bottle | flask
box              | noto:package     | seat           | cardboard box | carton, crate
treasure chest   |                  | cave heavy     | treasure, chest
coin             |                  |                | coins, gold coin | money, penny
bag of money     | noto:money-bag   |                | sack of gold
sword            | drawn:sword      | castle         |  | dagger
shield           |                  | castle         |  | armour
bow and arrow    |                  | forest         | bow, arrow, arrows
boomerang
bone
feather          |                  |                | feathers | quill
shell            | noto:spiral-shell | beach          | seashell | conch, clam, oyster
nest             | noto:nest-with-eggs | forest seat
rock             |                  | mountain heavy | stone, boulder | pebble
log              | noto:wood        | forest heavy   | wood, firewood | stump, timber, stick, branch
fire             |                  | forest heavy   | campfire, bonfire | flame, flames
ice              |                  | snow           | ice cube
hole             |                  | heavy          |  | pit, ditch
heart            | noto:red-heart   |                | hearts
snowball         | drawn:snowball   | snow
sled             |                  | snow seat heavy | sledge, sleigh
skates           | noto:ice-skate   | snow           | ice skates
skis             |                  | snow
surfboard        | drawn:surfboard  | beach ridden
roller skates    | noto:roller-skate |                | roller skate
flag             | drawn:flag       |                |  | banner
sign             | drawn:sign       |                | signpost
mask             | drawn:mask
stethoscope      |                  | hospital
bandage          | noto:adhesive-bandage | hospital       | plaster
ribbon           |                  |                |  | hair bow
cage             | drawn:cage       |                | birdcage
pillow           | drawn:pillow     | bedroom        | cushion
blanket          | drawn:blanket    | bedroom        |  | quilt, sheet
mat              | drawn:mat        |                | rug, carpet, magic carpet | towel
"""

FURNITURE = """
bed              |                  | bedroom seat   |  | cot, crib, mattress
chair            |                  | living room seat |  | stool, throne
sofa             | noto:couch-and-lamp | living room seat | couch | armchair
table            | drawn:table      | kitchen        |  | desk, counter
bench            | drawn:bench      | garden seat
bathtub          |                  | bathroom seat  | bath, tub of water
toilet           |                  | bathroom       |  | potty
shelf            | drawn:shelf      | library        | bookshelf, bookcase | cupboard, wardrobe
piano            | drawn:piano      | large stage    |  | organ
fireplace        | drawn:fireplace  | large living room |  | hearth, stove, oven
fence            | drawn:fence      | large garden   |  | hedge
well             | drawn:well       | large village  | wishing well
swing            | drawn:swing      | large playground seat | swings
slide            | noto:playground-slide | large playground
seesaw           | drawn:seesaw     | playground
hammock          | drawn:hammock    | large beach seat
mailbox          | noto:closed-mailbox-with-raised-flag | street         | letterbox, postbox
traffic light    | noto:vertical-traffic-light | street         | traffic lights
stop sign        |                  | street
street lamp      | drawn:streetlamp | large street   | lamppost, street light
tent             |                  | forest seat
beach umbrella   | noto:umbrella-on-ground | beach
dustbin          | noto:wastebasket | street         | trash can, bin, rubbish bin | garbage
shopping cart    |                  | market seat    | trolley
wheelbarrow      | drawn:wheelbarrow | farm seat
cart             | drawn:cart       | farm seat      | wagon, wooden cart | carriage
gravestone       | noto:headstone   |                | tombstone, grave
statue           | noto:moai        | large island
haystack         | drawn:haystack   | large farm     | hay, pile of hay | straw bale
"""

VEHICLES = """
car              | noto:sport-utility-vehicle | street seat    | automobile | jeep
race car         | noto:racing-car  | street seat    | racing car
taxi             |                  | city seat      | cab
police car       |                  | city seat
ambulance        |                  | city seat
fire engine      |                  | city seat      | fire truck
bus              |                  | city large seat | school bus | minibus, coach
truck            | noto:delivery-truck | city large seat | lorry | van
pickup truck     |                  | farm seat      | pickup
tractor          |                  | farm large seat |  | digger
train            | noto:locomotive  | large mountain seat | locomotive, steam train | railway
tram             |                  | city large seat | streetcar
motorcycle       |                  | street ridden  | motorbike
scooter          | noto:kick-scooter | street ridden  | kick scooter
bicycle          |                  | street ridden  | bike | tricycle
skateboard       |                  | small street ridden
wheelchair       | noto:manual-wheelchair | hospital seat
rickshaw         | noto:auto-rickshaw | street seat    | tuk-tuk
sailboat         |                  | sea swims seat | boat, sailing boat | yacht, raft
canoe            |                  | small river swims seat | rowing boat, rowboat | kayak, dinghy
motorboat        | noto:speedboat   | sea swims seat | speedboat
ship             |                  | large sea swims | steamship | ferry, ark
pirate ship      | drawn:pirateship | large sea swims |  | galleon
submarine        | drawn:submarine  | large underwater swims
plane            | noto:small-airplane | large sky air seat | airplane, aeroplane | jet, glider
helicopter       |                  | sky air seat
rocket |  | large space seat | spaceship, rocket ship, space ship | spacecraft
flying saucer    |                  | space air      | ufo | alien ship
hot air balloon  | drawn:hotairballoon | large sky air seat |  | airship
parachute        |                  | sky air
moon buggy       | drawn:rover      | moon           | space rover, rover
"""

BUILDINGS = """
house            |                  |                | home, cottage | cabin
hut              |                  |                | grass hut | shack
castle           |                  |                | palace | fortress
tower            | drawn:tower      |                |  | turret
church           |                  |                |  | chapel, cathedral
mosque
temple           | noto:hindu-temple |                |  | shrine, pagoda
school           | noto:school      |                | schoolhouse
hospital         |                  |                |  | clinic
shop             | noto:convenience-store |                | store
factory
skyscraper       | noto:office-building |                | office building | apartment
barn             | drawn:barn       |                |  | stable, shed
windmill         | drawn:windmill   |                | mill
lighthouse       | drawn:lighthouse
bridge           | drawn:bridge
treehouse        | drawn:treehouse  |                | tree house
igloo            | drawn:igloo
dog house        | drawn:doghouse   |                | kennel, doghouse | hutch
fountain
ferris wheel     |                  |                | big wheel
roller coaster   |                  |                | rollercoaster
merry-go-round   | noto:carousel-horse |                | carousel | rocking horse
circus tent      |                  |                | big top | marquee
stadium          |                  |                |  | arena
sandcastle       | drawn:sandcastle |                | sand castle
"""

SKY = """
rainbow          |                  | huge
moon             | noto:full-moon   |                | full moon
sun              |                  |                |  | sunshine
star             |                  | carried        | little star
shooting star    | drawn:shootingstar |                | falling star | comet, meteor
planet           | noto:ringed-planet |                | saturn
cloud            |                  | large          | little cloud
storm cloud      | noto:cloud-with-lightning | large          | thundercloud | thunder, lightning
tornado          |                  | large          | whirlwind | hurricane
fireworks        | drawn:fireworks  | large
snowflake        |                  | carried        | snowflakes
satellite        |                  |                | space station
musical notes    | noto:musical-note |                | musical note | song, music, tune
"""


@dataclass(frozen=True)
class Kind:
    """What the rows of a table have in common."""

    table: str
    art: str  # the set of a row without art
    size: str
    home: str = ""
    traits: tuple[str, ...] = ()


KINDS = {
    "animal": Kind(ANIMALS, "noto", "middle"),
    "bird": Kind(BIRDS, "noto", "middle"),
    "sea animal": Kind(SEA, "noto", "middle", "sea"),
    "insect": Kind(INSECTS, "noto", "tiny", "meadow"),
    "fantasy": Kind(FANTASY, "noto", "tall", "castle"),
    "person": Kind(PEOPLE, "person", "tall"),
    "plant": Kind(PLANTS, "noto", "small", "garden"),
    "food": Kind(FOOD, "noto", "tiny", "kitchen", ("carried", "plain")),
    "object": Kind(OBJECTS, "noto", "tiny", "", ("carried",)),
    "furniture": Kind(FURNITURE, "noto", "middle", "living room"),
    "vehicle": Kind(VEHICLES, "noto", "middle", "street"),
    "building": Kind(BUILDINGS, "noto", "huge"),
    "sky": Kind(SKY, "noto", "small", "sky", ("air",)),
}
BEINGS = (
    "animal",
    "bird",
    "sea animal",
    "insect",
    "fantasy",
    "person",
)  # who can have a mood and do something


@dataclass(frozen=True)
class Thing:
    """Something that can be shown."""

    name: str
    kind: str
    art: str
    size: float  # height, of a hero's
    home: str  # a place, or "" for anywhere
    traits: frozenset[str]
    words: tuple[str, ...]  # the name and its synonyms
    near: tuple[str, ...] = field(default=())

    @property
    def is_being(self) -> bool:
        return self.kind in BEINGS


def split(cell: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in cell.split(",") if word.strip())


def read_row(row: str, kind: str) -> Thing:
    """One row of a kind's table."""
    name, art, traits, synonyms, near = (cell.strip() for cell in f"{row}||||".split("|")[:5])
    known = KINDS[kind]
    home, size, own = known.home, known.size, set(known.traits)
    words = traits.split()
    place = [
        pair for pair in (" ".join(words[i : i + 2]) for i in range(len(words))) if " " in pair
    ]
    for pair in place:
        if pair in TWO_WORD_HOMES:
            home, words = pair, [word for word in words if word not in pair.split()]
    for word in words:
        if word in SIZES:
            size = word
        elif word in TRAITS:
            own.add(word)
        else:
            home = word
    if "heavy" in own:
        own.discard("carried")
    if not art:
        art = f"{known.art}:{name.replace(' ', '-')}"
    return Thing(
        name, kind, art, SIZES[size], home, frozenset(own), (name, *split(synonyms)), split(near)
    )


TRAITS = {"head", "flies", "swims", "air", "carried", "heavy", "ridden", "seat", "plain"}
TWO_WORD_HOMES = {"living room"}


def read_tables() -> dict[str, Thing]:
    """All things by name."""
    things = {}
    for kind, known in KINDS.items():
        for row in known.table.strip().splitlines():
            thing = read_row(row, kind)
            if thing.name in things:
                raise ValueError(f"two rows for {thing.name!r}")
            things[thing.name] = thing
    return things


THINGS = read_tables()

# A painter of few hours paints few things well: those that stories name most, and those that
# children ask for. The rest can be drawn.
PAINTED_NAMES = """
dog, rabbit, cat, frog, deer, fox, squirrel, mouse, puppy, cow, horse, bear, owl, lion, elephant, turtle,
kitten, monkey, snake, ant, wolf, sheep, pig, crocodile, goat, tiger, spider, hedgehog, giraffe, dinosaur,
snail, penguin, panda, unicorn, bird, hen, duck, crow, eagle, fish, whale, octopus, mermaid, crab,
butterfly, bee, alien, fairy, monster, ghost, dragon, robot, snowman, clown,
mother, boy, girl, father, man, grandfather, brother, king, farmer, woman, grandmother, baby, sister,
teacher, queen, doctor, princess, prince, knight, pirate, witch, wizard, astronaut,
tree, flower, bunch of flowers, leaf, pine tree, mushroom, rose, soup, candy, cake, milk, sandwich, apple,
bread, egg, nut, cookie, carrot, ice cream, honey, banana, pie, cheese, pumpkin,
teddy bear, log, door, ball, rock, box, present, heart, doll, coin, picture, bag, dress, hat, coat, fire,
shoes, rope, nest, bucket, book, feather, basket, letter, ladder, pot, treasure chest, trumpet, drum,
balloon, bell, key, bottle, crown, magic wand, sword, kite, umbrella, lantern,
bed, table, chair, swing, slide, well, fence, tent, cart, car, sailboat, truck, train, bicycle, plane,
ship, bus, rocket, hot air balloon, house, shop, school, castle, barn, tower, hut, bridge, ferris wheel,
merry-go-round, roller coaster, circus tent, lighthouse, sun, cloud, star, moon, rainbow, planet
"""
# Taught by the sixth further run; among those above when the shipped weights have had it.
LATER_NAMES = """
donkey, zebra, camel, beaver, hippopotamus, kangaroo, polar bear, otter, skunk, beetle, caterpillar,
rooster, goose, parrot, peacock, swan, seagull, shark, dolphin,
cook, sailor, guard, nurse, firefighter, police officer, superhero, santa claus,
sunflower, pizza, strawberry, clock, guitar, fireplace, sofa, bench, piano, tractor, fire engine, helicopter
"""
PAINTED = frozenset(split(PAINTED_NAMES))


def sprite_names() -> list[str]:
    """The sprites that the tables name, each once."""
    return sorted({t.art for t in THINGS.values() if t.art.split(":")[0] in ("noto", "fluent")})
