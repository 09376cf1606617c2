package store

import (
	"fmt"
	"math"
	"reflect"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/target"
)

// fillFields sets all fields of v to different values, none of which is zero. It uses reflection, so that it also sets
// fields that are added to the types later.
func fillFields(t *testing.T, v reflect.Value, next *int) {
	*next++
	switch v.Kind() {
	case reflect.String:
		v.SetString(fmt.Sprint("text ", *next))
	case reflect.Int, reflect.Int64:
		v.SetInt(int64(*next))
	case reflect.Float64:
		v.SetFloat(float64(*next) + 0.5)
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		fillFields(t, v.Elem(), next)
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 2, 2))
		for i := range v.Len() {
			fillFields(t, v.Index(i), next)
		}
	case reflect.Struct:
		if v.Type() == reflect.TypeFor[time.Time]() {
			v.Set(reflect.ValueOf(time.Unix(int64(*next), int64(*next)).UTC()))
			return
		}
		for i := range v.NumField() {
			fillFields(t, v.Field(i), next)
		}
	default:
		t.Fatalf("no value for a field of type %s", v.Type())
	}
}

// TestPackedFactsKeepEveryField packs facts in which each field has another value, and reads them back. No field may be
// lost.
func TestPackedFactsKeepEveryField(t *testing.T) {
	var whole Facts
	fillFields(t, reflect.ValueOf(&whole).Elem(), new(int))
	for i := range whole.Artifacts {
		whole.Artifacts[i].Kernels = nil // packed facts have no kernels
	}
	extreme := Facts{Newest: &api.Build{
		ID: math.MaxInt64, Attempt: math.MinInt, CreatedAt: time.Unix(math.MinInt32, 1).UTC(),
	}}
	want := map[target.Driver]Facts{
		{Version: "535.104.05", Flavour: target.Open}:        whole,
		{Version: "535.104.05", Flavour: target.Proprietary}: {},
		{Version: "535.54.03", Flavour: target.Open}:         extreme,
		{Version: "550.90.07-grid", Flavour: target.Open}:    {Newest: whole.Newest},
	}
	k := api.Kernel{Kernel: target.Kernel{BuildID: "1.2.3", Board: "lakitu"}}
	cells := NewKernelCells(k, want)

	got, order := map[target.Driver]Facts{}, []string(nil)
	for d, f := range cells.All() {
		got[d] = f
		order = append(order, d.String())
		if diff := cmp.Diff(f, cells.Facts(d)); diff != "" {
			t.Errorf("Facts(%s) differs from the facts of All() (-All +Facts):\n%s", d, diff)
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("All() differs from what was packed (-want +got):\n%s", diff)
	}
	var drivers []string
	for d := range cells.Drivers() {
		drivers = append(drivers, d.String())
	}
	if diff := cmp.Diff(drivers, order); diff != "" {
		t.Errorf("Drivers() and All() have different orders:\n%s", diff)
	}
	if len(order) != 4 || got[target.Driver{Version: "550.90.07-grid", Flavour: target.Open}].Newest == nil ||
		order[0][:3] != "550" || order[3][:9] != "535.54.03" {
		t.Errorf("the order is %q; want the newest version first", order)
	}
	unknown := cells.Facts(target.Driver{Version: "1.2", Flavour: target.Open})
	if unknown.Newest != nil || unknown.Artifacts != nil || cells.Kernel.BuildID != "1.2.3" {
		t.Errorf("Facts() of an unknown driver = %+v", unknown)
	}
}
