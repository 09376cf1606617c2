// SPDX-License-Identifier: GPL-2.0-only
/*
 * emugpu: a PCI device that answers like an NVIDIA Tesla T4 at rest.
 *
 * It exists so that NVIDIA's driver can be loaded, asked and unloaded in a
 * virtual machine that has no GPU. It presents a PCI root bus in a domain of
 * its own with one function on it. The function's configuration space is an
 * array; its BARs are memory that a boot parameter took away from the kernel:
 *
 *	memmap=96M$0x4f000000	on x86
 *	mem=2304M		on arm64, in a machine with 128 MiB more
 *
 * Nothing behind the registers computes anything:
 * the driver binds to the device and fails, as it should, when somebody opens
 * it.
 */
#include <linux/io.h>
#include <linux/ioport.h>
#include <linux/irq.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/pci.h>
#include <linux/spinlock.h>

/*
 * The bus window lies strictly inside the reserved range. If the two were equal,
 * the range that comes later would become the parent in the resource tree, and
 * the BARs could not be claimed below the window.
 */
#ifdef CONFIG_ARM64
/* The virt machine has its memory from 0x40000000 on; BARs are aligned to their sizes. */
#define WINDOW_START	0xd2000000UL
#define BOOT_WITH	"mem=2304M"
#else
#define WINDOW_START	0x50000000UL
#define BOOT_WITH	"memmap=96M$0x4f000000"
#endif
#define WINDOW_END	(WINDOW_START + 0x03ffffffUL)
#define BAR0_START	WINDOW_START	/* registers */
#define BAR0_SIZE	0x01000000UL
#define BAR1_START	(WINDOW_START + 0x02000000UL) /* frame buffer aperture, 64 bits wide */
#define BAR1_SIZE	0x02000000UL
#define BAR3_START	(WINDOW_START + 0x01000000UL) /* instance memory, 64 bits wide */
#define BAR3_SIZE	0x01000000UL
#define BAR_WIDE	(PCI_BASE_ADDRESS_MEM_TYPE_64 | \
			 PCI_BASE_ADDRESS_MEM_PREFETCH)

#define CAP_EXPRESS	0x78
#define CAP_MSIX	0xb4
#define MSIX_VECTORS	6
#define MSIX_TABLE	0x00b90000	/* offset in BAR0 */
#define MSIX_PENDING	0x00ba0000

/* Chip identity registers; the driver rejects a device that has none. */
#define PMC_BOOT_0	0x000
#define PMC_BOOT_42	0xa00
#define TU104_BOOT_0	0x164000a1
#define TU104_BOOT_42	0x164a1000

static u8 config[256];
static DEFINE_RAW_SPINLOCK(config_lock);
static struct pci_bus *root;

#ifdef CONFIG_X86
static struct pci_sysdata sysdata = {
	.domain = 1,
	.node = NUMA_NO_NODE,
};
#endif

static struct resource window = {
	.name = "emugpu window",
	.start = WINDOW_START,
	.end = WINDOW_END,
	.flags = IORESOURCE_MEM,
};

static struct resource busses = {
	.name = "emugpu bus",
	.start = 0,
	.end = 0,
	.flags = IORESOURCE_BUS,
};

static void put8(int at, u8 value)
{
	config[at] = value;
}

static void put16(int at, u16 value)
{
	put8(at, value);
	put8(at + 1, value >> 8);
}

static void put32(int at, u32 value)
{
	put16(at, value);
	put16(at + 2, value >> 16);
}

static u32 get32(int at)
{
	return config[at] | config[at + 1] << 8 | config[at + 2] << 16 |
	       (u32)config[at + 3] << 24;
}

static void fill_config(void)
{
	memset(config, 0, sizeof(config));
	put16(PCI_VENDOR_ID, PCI_VENDOR_ID_NVIDIA);
	put16(PCI_DEVICE_ID, 0x1eb8);
	put16(PCI_COMMAND, PCI_COMMAND_MEMORY);
	put16(PCI_STATUS, PCI_STATUS_CAP_LIST);
	put8(PCI_CLASS_REVISION, 0xa1);
	put8(PCI_CLASS_PROG, 0x00);
	put16(PCI_CLASS_DEVICE, PCI_CLASS_DISPLAY_3D);
	put32(PCI_BASE_ADDRESS_0, BAR0_START);
	put32(PCI_BASE_ADDRESS_1, BAR1_START | BAR_WIDE);
	put32(PCI_BASE_ADDRESS_3, BAR3_START | BAR_WIDE);
	put16(PCI_SUBSYSTEM_VENDOR_ID, PCI_VENDOR_ID_NVIDIA);
	put16(PCI_SUBSYSTEM_ID, 0x12a2);
	put8(PCI_CAPABILITY_LIST, CAP_EXPRESS);
	/*
	 * Line 11 is a line of a PC's interrupt controller. On another machine
	 * the number may belong to another device.
	 */
	if (IS_ENABLED(CONFIG_X86)) {
		put8(PCI_INTERRUPT_LINE, 11);
		put8(PCI_INTERRUPT_PIN, 1);
	}

	put8(CAP_EXPRESS + PCI_CAP_LIST_ID, PCI_CAP_ID_EXP);
	put8(CAP_EXPRESS + PCI_CAP_LIST_NEXT, CAP_MSIX);
	put16(CAP_EXPRESS + PCI_EXP_FLAGS, 2 | PCI_EXP_TYPE_ENDPOINT << 4);
	put32(CAP_EXPRESS + PCI_EXP_DEVCAP, PCI_EXP_DEVCAP_RBER);
	put32(CAP_EXPRESS + PCI_EXP_LNKCAP,
	      PCI_EXP_LNKCAP_SLS_8_0GB | 16 << 4);
	put16(CAP_EXPRESS + PCI_EXP_LNKSTA,
	      PCI_EXP_LNKSTA_CLS_8_0GB | PCI_EXP_LNKSTA_NLW_X8);

	put8(CAP_MSIX + PCI_CAP_LIST_ID, PCI_CAP_ID_MSIX);
	put16(CAP_MSIX + PCI_MSIX_FLAGS, MSIX_VECTORS - 1);
	put32(CAP_MSIX + PCI_MSIX_TABLE, MSIX_TABLE);
	put32(CAP_MSIX + PCI_MSIX_PBA, MSIX_PENDING);
}

/*
 * writable returns the bits that a write may change in the aligned word at
 * this offset. A BAR's size shows in the address bits that stay zero.
 */
static u32 writable(int at)
{
	switch (at) {
	case PCI_COMMAND:
		return PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER |
		       PCI_COMMAND_PARITY | PCI_COMMAND_SERR |
		       PCI_COMMAND_INTX_DISABLE;
	case PCI_CACHE_LINE_SIZE:
		return 0xffff;
	case PCI_BASE_ADDRESS_0:
		return ~(u32)(BAR0_SIZE - 1);
	case PCI_BASE_ADDRESS_1:
		return ~(u32)(BAR1_SIZE - 1);
	case PCI_BASE_ADDRESS_3:
		return ~(u32)(BAR3_SIZE - 1);
	case PCI_BASE_ADDRESS_2:	/* upper halves */
	case PCI_BASE_ADDRESS_4:
		return ~0U;
	case PCI_INTERRUPT_LINE:
		return 0xff;
	case CAP_EXPRESS + PCI_EXP_DEVCTL:
	case CAP_EXPRESS + PCI_EXP_LNKCTL:
	case CAP_EXPRESS + PCI_EXP_DEVCTL2:
		return 0xffff;
	case CAP_MSIX:
		return (u32)(PCI_MSIX_FLAGS_ENABLE | PCI_MSIX_FLAGS_MASKALL)
		       << 16;
	}
	return 0;
}

static bool outside(struct pci_bus *bus, unsigned int devfn)
{
	return bus->number != 0 || devfn != PCI_DEVFN(0, 0);
}

static int emugpu_read(struct pci_bus *bus, unsigned int devfn, int where,
		       int size, u32 *value)
{
	unsigned long flags;
	int i;

	*value = ~0U;
	if (outside(bus, devfn))
		return PCIBIOS_DEVICE_NOT_FOUND;
	if (where < 0 || where + size > (int)sizeof(config))
		return PCIBIOS_BAD_REGISTER_NUMBER;
	raw_spin_lock_irqsave(&config_lock, flags);
	*value = 0;
	for (i = 0; i < size; i++)
		*value |= (u32)config[where + i] << (8 * i);
	raw_spin_unlock_irqrestore(&config_lock, flags);
	return PCIBIOS_SUCCESSFUL;
}

static int emugpu_write(struct pci_bus *bus, unsigned int devfn, int where,
			int size, u32 value)
{
	int word = where & ~3, shift = (where & 3) * 8;
	unsigned long flags;
	u32 mask;

	if (outside(bus, devfn))
		return PCIBIOS_DEVICE_NOT_FOUND;
	if (where < 0 || where + size > (int)sizeof(config))
		return PCIBIOS_BAD_REGISTER_NUMBER;
	mask = size == 4 ? ~0U : ((1U << (8 * size)) - 1) << shift;
	mask &= writable(word);
	raw_spin_lock_irqsave(&config_lock, flags);
	put32(word, (get32(word) & ~mask) | (value << shift & mask));
	raw_spin_unlock_irqrestore(&config_lock, flags);
	return PCIBIOS_SUCCESSFUL;
}

static struct pci_ops ops = {
	.read = emugpu_read,
	.write = emugpu_write,
};

static int fill_registers(void)
{
	void __iomem *regs = ioremap(BAR0_START, BAR0_SIZE);

	if (!regs)
		return -ENOMEM;
	memset_io(regs, 0, BAR0_SIZE);
	writel(TU104_BOOT_0, regs + PMC_BOOT_0);
	writel(TU104_BOOT_42, regs + PMC_BOOT_42);
	iounmap(regs);
	return 0;
}

#ifdef CONFIG_X86
static struct pci_bus *create_root(struct list_head *resources)
{
	return pci_create_root_bus(NULL, 0, &ops, &sysdata, resources);
}

static int add_interrupt(void)
{
	return 0;
}

static void drop_interrupt(void)
{
}
#else
static int irq;

/*
 * On this architecture the host bridge, and not sysdata, has the number of the
 * PCI domain. Asking the kernel for a free number would fail, because the
 * device tree gives a number to the machine's own bridge.
 */
static struct pci_bus *create_root(struct list_head *resources)
{
	struct pci_host_bridge *bridge = pci_alloc_host_bridge(0);

	if (!bridge)
		return NULL;
	list_splice_init(resources, &bridge->windows);
	bridge->ops = &ops;
	bridge->busnr = 0;
	bridge->domain_nr = 1;
	if (pci_scan_root_bus_bridge(bridge)) {
		pci_free_host_bridge(bridge);
		return NULL;
	}
	return bridge->bus;
}

/*
 * The bridge has no controller for message signalled interrupts, and the
 * machine has no interrupt line of a PC. The device gets an interrupt of its
 * own, which it never raises.
 */
static int add_interrupt(void)
{
	struct pci_dev *dev;

	root->bus_flags |= PCI_BUS_FLAGS_NO_MSI;
	irq = irq_alloc_desc(NUMA_NO_NODE);
	if (irq < 0)
		return irq;
	irq_set_chip_and_handler(irq, &dummy_irq_chip, handle_simple_irq);
	irq_clear_status_flags(irq, IRQ_NOREQUEST);
	list_for_each_entry(dev, &root->devices, bus_list)
		dev->irq = irq;
	return 0;
}

static void drop_interrupt(void)
{
	irq_free_desc(irq);
}
#endif

static int __init emugpu_init(void)
{
	LIST_HEAD(resources);
	int err;

	if (region_intersects(WINDOW_START, WINDOW_END + 1 - WINDOW_START,
			      IORESOURCE_SYSTEM_RAM,
			      IORES_DESC_NONE) != REGION_DISJOINT) {
		pr_err("emugpu: the window %pR is RAM: boot with " BOOT_WITH "\n",
		       &window);
		return -EBUSY;
	}
	fill_config();
	err = insert_resource(&iomem_resource, &window);
	if (err)
		return err;
	err = fill_registers();
	if (err)
		goto release;
	pci_add_resource(&resources, &window);
	pci_add_resource(&resources, &busses);
	root = create_root(&resources);
	if (!root) {
		pci_free_resource_list(&resources);
		err = -ENODEV;
		goto release;
	}
	pci_lock_rescan_remove();
	pci_scan_child_bus(root);
	/*
	 * The BARs are preset: the allocator would refuse memory that the
	 * firmware's map calls reserved.
	 */
	pci_bus_claim_resources(root);
	err = add_interrupt();
	if (err) {
		pci_stop_root_bus(root);
		pci_remove_root_bus(root);
		pci_unlock_rescan_remove();
		goto release;
	}
	pci_bus_add_devices(root);
	pci_unlock_rescan_remove();
	return 0;

release:
	remove_resource(&window);
	return err;
}

static void __exit emugpu_exit(void)
{
	pci_lock_rescan_remove();
	pci_stop_root_bus(root);
	pci_remove_root_bus(root);
	pci_unlock_rescan_remove();
	drop_interrupt();
	remove_resource(&window);
}

module_init(emugpu_init);
module_exit(emugpu_exit);
MODULE_DESCRIPTION("A PCI device that answers like an NVIDIA GPU at rest");
MODULE_LICENSE("GPL");
